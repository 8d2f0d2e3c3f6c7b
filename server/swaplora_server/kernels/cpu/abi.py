"""The structures of csrc/abi.h, field by field, and the one shared library that has them."""

import ctypes
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from swaplora_server.kernels.cpu import ahead, build


class Format(IntEnum):
    """How a linear's weight is stored and multiplied."""

    FP32 = 0
    FP32_OF_BF16 = 1
    BF16 = 2
    INT8 = 3
    FOUR_BIT = 4


class LinearWeight(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("format", ctypes.c_int64),
        ("block", ctypes.c_int64),
    )


class LinearJob(ctypes.Structure):
    _fields_ = (("weight", ctypes.POINTER(LinearWeight)), ("y", ctypes.c_void_p))


class Span(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class Factors(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("column_scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("a_is_bf16", ctypes.c_int32),
        ("b_is_bf16", ctypes.c_int32),
        ("is_targeted", ctypes.c_int64),
    )


class Router(ctypes.Structure):
    _fields_ = (
        ("prototypes", ctypes.c_void_p),
        ("members", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("shares", ctypes.c_void_p),
    )


class Segment(ctypes.Structure):
    _fields_ = (
        ("factors", ctypes.POINTER(Factors)),
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("router", ctypes.POINTER(Router)),
        ("member", ctypes.c_int64),
    )


class LoraModule(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int64), ("out", ctypes.c_int64), ("y", ctypes.c_void_p))


class LayerCache(ctypes.Structure):
    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("is_bf16", ctypes.c_int64),
        ("is_whole", ctypes.c_int64),
    )


class Run(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
    )


NUM_LINEARS = 7  # q, k, v, o, gate, up, down
NUM_NORMS = 4  # of the input, after attention, of queries, of keys


class DecoderLayer(ctypes.Structure):
    _fields_ = (
        ("linears", ctypes.POINTER(LinearWeight) * NUM_LINEARS),
        ("numbers", ctypes.c_int64 * NUM_LINEARS),
        ("norms", ctypes.c_void_p * NUM_NORMS),
        ("norm_numbers", ctypes.c_int64 * NUM_NORMS),
        ("eps", ctypes.c_double),
        ("cache", LayerCache),
    )


class NormWeight(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


NUM_ENCODER_LINEARS = 6  # q, k, v, o, up, down


class EncoderLayer(ctypes.Structure):
    _fields_ = (
        ("linears", ctypes.POINTER(LinearWeight) * NUM_ENCODER_LINEARS),
        ("numbers", ctypes.c_int64 * NUM_ENCODER_LINEARS),
        ("norms", NormWeight * 2),
        ("norm_numbers", ctypes.c_int64 * 2),
        ("eps", ctypes.c_double),
        ("cache", LayerCache),
    )


NUM_MODERN_LINEARS = 4  # qkv, o, up, down


class ModernLayer(ctypes.Structure):
    _fields_ = (
        ("linears", ctypes.POINTER(LinearWeight) * NUM_MODERN_LINEARS),
        ("numbers", ctypes.c_int64 * NUM_MODERN_LINEARS),
        ("norms", NormWeight * 2),
        ("norm_numbers", ctypes.c_int64 * 2),
        ("eps", ctypes.c_double),
        ("cache", LayerCache),
    )


class ReplacedRows(ctypes.Structure):
    _fields_ = (("start", ctypes.c_int64), ("stop", ctypes.c_int64), ("modules", ctypes.POINTER(ctypes.c_void_p)))


class Rows(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("segments", ctypes.c_void_p),
        ("num_segments", ctypes.c_int64),
        ("replaced", ctypes.c_void_p),
        ("num_replaced", ctypes.c_int64),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("tokens", Rows),
        ("head", Rows),
        ("logits_to_keep", ctypes.c_void_p),
        ("hidden_size", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("num_runs", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
    )


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    LinearWeight,
    LinearJob,
    Span,
    Factors,
    Segment,
    LoraModule,
    LayerCache,
    Run,
    DecoderLayer,
    ReplacedRows,
    Rows,
    Step,
    NormWeight,
    EncoderLayer,
    ModernLayer,
    Router,
)


def load_library(cache_dir: Path, report: Callable[[str], None]) -> ctypes.CDLL:
    """All kernels, compiled the first time. Raises NoCompilerError, and RuntimeError for structures that differ."""
    library = build.load("kernels", build.SOURCES, cache_dir, report, ahead.runnable("kernels", build.SOURCES))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    _declare(library, "struct_bytes", [ctypes.c_char_p], size)
    check_structures(library)
    _declare(library, "lanes", [], size)
    _declare(library, "fp32_words", [size, size, number], size)
    _declare(library, "fp32_pack", [pointer, size, size, number, pointer])
    _declare(library, "bf16_words", [size, size], size)
    _declare(library, "bf16_pack", [pointer, size, size, pointer])
    _declare(library, "has_bf16_instruction", [], number)
    _declare(library, "linear", [pointer, size, size, ctypes.POINTER(LinearJob), size, pointer, size, number])
    jobs = [ctypes.POINTER(Segment), size, ctypes.POINTER(LoraModule), size]
    for name in ("lora_delta_fp32", "lora_delta_bf16"):
        _declare(library, name, [*jobs, size, pointer, number])
    factor = [pointer, number, number, pointer]
    _declare(library, "place_factors", [size, size, size, ctypes.c_float, *factor, *factor], number)
    _declare(library, "core_for", [pointer, number, number, pointer, number], number)
    _declare(library, "move_to", [number], number)
    rows = [pointer] * 4
    _declare(library, "paged_attention", [ctypes.POINTER(LayerCache), pointer, size, *rows, number])
    _declare(library, "decode", [ctypes.POINTER(DecoderLayer), size, ctypes.POINTER(Step)])
    _declare(library, "encode", [ctypes.POINTER(EncoderLayer), size, ctypes.POINTER(Step)])
    _declare(library, "encode_modern", [ctypes.POINTER(ModernLayer), ctypes.POINTER(Step)])
    return library


def check_structures(library: ctypes.CDLL) -> None:
    """Raise RuntimeError unless every structure here is as large as the library's."""
    for structure in STRUCTURES:
        num_bytes = library.struct_bytes(structure.__name__.encode())
        if num_bytes != ctypes.sizeof(structure):
            raise RuntimeError(f"{structure.__name__} has {num_bytes} bytes in csrc/abi.h: kernels/cpu/abi.py differs")


def _declare(library: ctypes.CDLL, name: str, arguments: Sequence[Any], result: Any = None) -> None:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, result
