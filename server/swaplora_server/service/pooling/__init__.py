"""Prompts of which a vector is wanted and no token."""
