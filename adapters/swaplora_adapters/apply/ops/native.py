"""The form for CPUs with a C++ compiler: each adapter's factors read once, rows in a fixed order of sums."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from swaplora_adapters.apply.activation import LoraOp, ModuleSegment
from swaplora_adapters.native import build

_SOURCE = Path(__file__).with_name("lora_delta.cpp")


class _Segment(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b_t", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("scale", ctypes.c_double),
    )


def load(cache_dir: Path, report: Callable[[str], None]) -> LoraOp:
    """The native form, for tensors on CPU in float32 or bfloat16. Raises NoCompilerError."""
    library = build.load(_SOURCE, cache_dir, report)
    kernels = {torch.float32: library.lora_delta_f32, torch.bfloat16: library.lora_delta_bf16}
    for kernel in kernels.values():
        kernel.restype = None
        kernel.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]

    def add(y: Tensor, x: Tensor, prepared: _Prepared) -> None:
        kernels[y.dtype](
            prepared.table,
            len(prepared.table),
            x.shape[1],
            y.shape[1],
            x.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )

    return LoraOp(_prepare, add)


class _Prepared(NamedTuple):
    """The kernel's table of segments, and the tensors that it points into."""

    table: "ctypes.Array[_Segment]"
    tensors: list[tuple[Tensor, Tensor]]


def _prepare(segments: Sequence[ModuleSegment]) -> _Prepared:
    # B is stored transposed, so that this copies nothing
    tensors = [(segment.lora_A.contiguous(), segment.lora_B.t().contiguous()) for segment in segments]
    rows = [
        _Segment(a.data_ptr(), b_t.data_ptr(), len(a), segment.start, segment.stop, segment.scale)
        for (a, b_t), segment in zip(tensors, segments, strict=True)
    ]
    return _Prepared((_Segment * len(rows))(*rows), tensors)
