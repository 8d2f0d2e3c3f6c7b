"""The engine: continuous batching over one model, a paged KV cache with prefix caching, adapters by the row, sampling.

May import kernels and the adapters package. One thread, "engine", owns all of it and alone runs steps; others send it
commands and read its snapshot.
"""
