"""Bytes that nobody should trust: names, JSON, safetensors and the disk. Imports nothing but `errors`."""
