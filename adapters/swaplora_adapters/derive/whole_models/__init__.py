"""Whole models in and out, offline: `export` writes one of a base and adapters, `extract` makes an adapter of one."""
