"""SGMV and BGMV (Punica) for CPUs with a C++ compiler: each adapter's factors read once, sums in a fixed order.

The equation and the shapes are `LoraOp`'s; the kernel is csrc/lora_delta.cpp.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.kernels.backend import LoraOp
from swaplora_server.kernels.cpu import build
from swaplora_server.kernels.rows import Segment

_SOURCE = build.CSRC / "lora_delta.cpp"


class _Factors(ctypes.Structure):
    """As in lora_delta.h."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b_t", ctypes.c_void_p),
        ("column_scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("a_is_bf16", ctypes.c_int32),
        ("b_is_bf16", ctypes.c_int32),
        ("is_targeted", ctypes.c_int64),
    )


class _Segment(ctypes.Structure):
    _fields_ = (
        ("factors", ctypes.POINTER(_Factors)),
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("scale", ctypes.c_double),
    )


class _Module(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int64), ("out", ctypes.c_int64), ("y", ctypes.c_void_p))


class SegmentTable:
    """A step's segments as the kernel reads them, and what they point into."""

    def __init__(self, segments: Sequence[Segment], tables: "Sequence[_FactorTable]") -> None:
        self._kept = tables, [segment.weights for segment in segments]
        self.entries = (_Segment * len(segments))()
        for entry, segment, table in zip(self.entries, segments, tables, strict=True):
            entry.factors = table.entries
            entry.start, entry.stop, entry.scale = segment.start, segment.stop, segment.scale


class _FactorTable:
    """One adapter's factors by module number. Points into the adapter's own tensors."""

    def __init__(self, weights: AdapterWeights, paths: Sequence[str]) -> None:
        self.entries = (_Factors * len(paths))()
        numbers = {path: number for number, path in enumerate(paths)}
        for path, module in weights.modules.items():
            self.entries[numbers[path]] = _factors_of(path, module)


def _factors_of(path: str, module: ModuleWeights) -> _Factors:
    lora_A, b_t = module.lora_A, module.lora_B.t()
    if not (lora_A.is_contiguous() and b_t.is_contiguous()):
        raise ValueError(f"{path}: the factors are not laid out as ModuleWeights says")
    vectors = [None if vector is None else vector.data_ptr() for vector in (module.column_scale, module.shift)]
    is_bf16 = [tensor.dtype == torch.bfloat16 for tensor in (lora_A, b_t)]
    return _Factors(lora_A.data_ptr(), b_t.data_ptr(), *vectors, module.rank, *is_bf16, True)


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
    tables: WeakKeyDictionary[AdapterWeights, _FactorTable] = WeakKeyDictionary()

    def table_of(weights: AdapterWeights, paths: Sequence[str]) -> _FactorTable:
        table = tables.get(weights)
        if table is None:
            table = tables[weights] = _FactorTable(weights, paths)
        return table

    def prepare(segments: Sequence[Segment], paths: Sequence[str]) -> SegmentTable:
        return SegmentTable(segments, [table_of(segment.weights, paths) for segment in segments])

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
