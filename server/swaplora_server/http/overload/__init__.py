"""Refusals that cost little, where many come: what was decided by little of a request is decided again by as little."""
