"""SGMV and BGMV (Punica) for CPUs with a C++ compiler: each adapter's factors read once, sums in a fixed order.

The equation and the shapes are `LoraOp`'s; the kernel is csrc/lora_delta.cpp.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from swaplora_server.kernels.backend import LoraOp
from swaplora_server.kernels.cpu import abi
from swaplora_server.kernels.cpu.adapter_tables import tables_of
from swaplora_server.kernels.rows import Segment


class SegmentTable:
    """A step's segments as the kernel reads them, and what they point into."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._kept = [segment.weights for segment in segments]
        self.entries = (abi.Segment * len(segments))()
        for entry, segment in zip(self.entries, segments, strict=True):
            entry.factors = ctypes.cast(tables_of(segment.weights).factors, ctypes.POINTER(abi.Factors))
            entry.start, entry.stop, entry.scale = segment.start, segment.stop, segment.scale


def op(library: ctypes.CDLL) -> LoraOp:
    """This backend's operation, for rows on CPU in float32 or bfloat16."""
    kernels = {torch.float32: library.lora_delta_f32, torch.bfloat16: library.lora_delta_bf16}

    def prepare(segments: Sequence[Segment], _paths: Sequence[str]) -> SegmentTable:
        return SegmentTable(segments)

    def add(y: Tensor, x: Tensor, prepared: SegmentTable, number: int) -> None:
        kernels[y.dtype](
            prepared.entries,
            len(prepared.entries),
            abi.LoraModule(number, y.shape[1], y.data_ptr()),
            1,
            x.shape[1],
            x.data_ptr(),
            torch.get_num_threads(),
        )

    return LoraOp(prepare, add)
