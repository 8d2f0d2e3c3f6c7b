"""What a generation is asked for, what of it cannot be, and the engine of a base that generates."""
