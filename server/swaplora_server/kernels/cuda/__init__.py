"""NVIDIA GPUs: kernels in Triton. What plans their work is numpy's and imports neither torch nor triton.

Where no GPU is, they are proven by Triton's interpreter and by its compiler alone: see tests/cuda.
"""
