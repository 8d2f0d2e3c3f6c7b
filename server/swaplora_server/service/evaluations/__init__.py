"""Evaluations: task files asked of models in the shared batch, behind all else, and what is kept of them."""
