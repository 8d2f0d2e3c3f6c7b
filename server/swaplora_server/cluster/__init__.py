"""Many replicas on Ray Serve: which of them serves a request, and how it gets there.

`affinity.py` and what it reads decide, and import nothing of Ray.
"""
