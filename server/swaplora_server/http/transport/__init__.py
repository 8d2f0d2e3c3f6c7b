"""Bytes on connections: limits of time and memory, encodings, browsers. It knows no route and no adapter."""
