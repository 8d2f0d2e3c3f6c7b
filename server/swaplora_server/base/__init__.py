"""The base model: loaded by transformers, given paged attention and wrapped modules, proven before it serves.

May import engine and kernels. Loaded and proven on the thread that starts the server; threads that load adapters read
its weights and have modules made like its own.
"""
