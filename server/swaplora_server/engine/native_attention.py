"""The decode kernel for CPUs with a C++ compiler: every row attends straight from its blocks, nothing is gathered."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from swaplora_adapters.native import build
from swaplora_server.engine.attention import DecodeGroup, DecodeKernel, LayerAttention

_SOURCE = Path(__file__).with_name("decode_attention.cpp")
_LANES = 8  # head sizes are read this many floats at a time


class _Shape(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("max_length", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


def load(cache_dir: Path, report: Callable[[str], None]) -> DecodeKernel:
    """The native kernel, for tensors on CPU in float32 or bfloat16. Raises NoCompilerError."""
    library = build.load(_SOURCE, cache_dir, report)
    kernels = {torch.float32: library.decode_attention_f32, torch.bfloat16: library.decode_attention_bf16}
    for kernel in kernels.values():
        kernel.restype = None
        kernel.argtypes = [ctypes.POINTER(_Shape), *[ctypes.c_void_p] * 8, ctypes.c_int]

    def decode(
        query: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup, layer: LayerAttention, out: Tensor
    ) -> bool:
        """See DecodeKernel. Leaves to the caller what it has no code for: odd head sizes, values of another size."""
        head_dim = query.shape[2]
        if query.dtype not in kernels or head_dim % _LANES or values.shape[2] != head_dim:
            return False
        query = query.contiguous()
        sinks = None if layer.sinks is None else layer.sinks.float().contiguous()
        shape = _Shape(
            len(group.rows),
            query.shape[1],
            keys.shape[1],
            head_dim,
            group.slots.shape[1],
            layer.window or 0,
            layer.scaling,
            layer.softcap or 0.0,
        )
        kernels[query.dtype](
            shape,
            group.rows.data_ptr(),
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            group.slots.data_ptr(),
            group.lengths.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return True

    return decode
