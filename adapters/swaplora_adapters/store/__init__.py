"""The data directory: blobs by digest, manifests, the catalogue, and what a crash left behind.

Durable when a call returns. Imports `config` and `files`, never the registry that keeps names in memory.
"""
