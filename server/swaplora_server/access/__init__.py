"""Who may do what: keys, the file that they lie in, and whom a request comes from.

Knows no HTTP and no torch, and of adapters only how names of a tenant are stored. Imports nothing of the server.
"""
