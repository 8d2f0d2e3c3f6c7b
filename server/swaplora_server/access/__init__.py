"""Who may do what: keys, the file that they lie in, and whom a request comes from.

Knows no HTTP, no adapters and no torch. Imports nothing of the server.
"""
