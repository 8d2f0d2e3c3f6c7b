"""Kernels: base linears, the LoRA operation (SGMV), paged attention, fused layers; a folder for each backend.

May import the adapters package, and nothing else of the server. The engine's thread runs them, with torch's OpenMP
threads beside it; linears are packed on whatever thread loads a base or an adapter.
"""
