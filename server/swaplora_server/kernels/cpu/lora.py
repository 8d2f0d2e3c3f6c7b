"""SGMV and BGMV (Punica) for CPUs with a C++ compiler: each adapter's factors read once, sums in a fixed order.

The equation and the shapes are `LoraOp`'s; the kernel is csrc/lora_delta.cpp.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from swaplora_server.kernels.backend import LoraOp
from swaplora_server.kernels.cpu import build
from swaplora_server.kernels.cpu.adapter_tables import Factors, tables_of
from swaplora_server.kernels.rows import Segment

_SOURCE = build.CSRC / "lora_delta.cpp"


class _Segment(ctypes.Structure):
    _fields_ = (
        ("factors", ctypes.POINTER(Factors)),
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("scale", ctypes.c_double),
    )


class _Module(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int64), ("out", ctypes.c_int64), ("y", ctypes.c_void_p))


class SegmentTable:
    """A step's segments as the kernel reads them, and what they point into."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._kept = [segment.weights for segment in segments]
        self.entries = (_Segment * len(segments))()
        for entry, segment in zip(self.entries, segments, strict=True):
            entry.factors = ctypes.cast(tables_of(segment.weights).factors, ctypes.POINTER(Factors))
            entry.start, entry.stop, entry.scale = segment.start, segment.stop, segment.scale


def load_library(cache_dir: Path, report: Callable[[str], None]) -> ctypes.CDLL:
    """The compiled kernel. Raises NoCompilerError."""
    library = build.load(_SOURCE, cache_dir, report)
    for kernel in (library.lora_delta_f32, library.lora_delta_bf16):
        kernel.restype = None
        kernel.argtypes = [
            ctypes.POINTER(_Segment),
            ctypes.c_int64,
            ctypes.POINTER(_Module),
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int,
        ]
    return library


def op(library: ctypes.CDLL) -> LoraOp:
    """This backend's operation, for rows on CPU in float32 or bfloat16."""
    kernels = {torch.float32: library.lora_delta_f32, torch.bfloat16: library.lora_delta_bf16}

    def prepare(segments: Sequence[Segment], _paths: Sequence[str]) -> SegmentTable:
        return SegmentTable(segments)

    def add(y: Tensor, x: Tensor, prepared: SegmentTable, number: int) -> None:
        kernels[y.dtype](
            prepared.entries,
            len(prepared.entries),
            _Module(number, y.shape[1], y.data_ptr()),
            1,
            x.shape[1],
            x.data_ptr(),
            torch.get_num_threads(),
        )

    return LoraOp(prepare, add)
