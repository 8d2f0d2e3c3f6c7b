"""What a model makes of whole prompts, where that itself is wanted and no token."""
