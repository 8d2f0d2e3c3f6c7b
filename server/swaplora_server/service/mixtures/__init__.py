"""Mixtures per token: routers made of their members' weights, and what is seen of a router's choices."""
