"""What a server would find on this machine, and what of it costs speed or stops the start. Imports no torch."""
