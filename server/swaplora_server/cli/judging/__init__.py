"""Commands that judge versions of adapters: evaluations, gates, and what follows from them."""
