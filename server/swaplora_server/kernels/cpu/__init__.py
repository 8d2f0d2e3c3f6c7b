"""The cpu backend: C++ in csrc/, compiled on first use for the processor at hand and called through ctypes.

A source and its Python side have a structure in common, field by field; the .h files are what sources share.
"""
