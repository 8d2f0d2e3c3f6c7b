"""What a generation is asked for, and what of it cannot be."""
