"""LoRA in a transformers model: its modules wrapped once, which look up in each step which rows use which adapters.

May import kernels and the adapters package. Runs on the engine's thread.
"""
