"""Attention of whole inputs for CPUs with a C++ compiler: one call a layer, whatever number of inputs a step has.

The kernel is that of paged attention: keys and values of the step lie in blocks, which the next layer writes anew.
"""

import ctypes

import torch

from swaplora_server.kernels.cpu.attention import CpuKV, CpuStep
from swaplora_server.kernels.step import Runs

_BLOCK_SIZE = 32  # rows: two vectors of keys, as many as the kernel works on at a time


class CpuWhole:
    """See `WholeAttention`. Has memory for the largest step so far."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._num_blocks = 0
        self._kv: CpuKV | None = None

    def step(self, runs: Runs) -> CpuStep:
        """See `WholeAttention`."""
        lengths = runs.lengths.tolist()
        tables: list[range] = []
        num_blocks = 0
        for length in lengths:
            tables.append(range(num_blocks, num_blocks - (-length // _BLOCK_SIZE)))
            num_blocks = tables[-1].stop
        if self._kv is None or num_blocks > self._num_blocks:
            self._num_blocks = num_blocks
            self._kv = CpuKV(self._library, num_blocks, _BLOCK_SIZE, torch.float32, is_whole=True)
        return self._kv.step(Runs([0] * len(lengths), lengths, tables, _BLOCK_SIZE))
