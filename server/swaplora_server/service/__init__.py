"""The server without HTTP: it builds registry and engine, tokenizes, admits, generates, and counts.

Imports `base`, `engine` and what lies below them. It runs on the event loop; what takes long, on threads of its own.
"""
