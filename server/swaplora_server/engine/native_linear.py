"""Float32 linears for CPUs with a C++ compiler: W laid out once, every row's result the same alone and among others."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swaplora_adapters.native import build

_SOURCE = Path(__file__).with_name("packed_linear.cpp")


def load(cache_dir: Path, report: Callable[[str], None]) -> Callable[[nn.Module], nn.Module]:
    """What makes a packed stand-in for a float32 linear or Conv1D on CPU. Raises NoCompilerError."""
    library = build.load(_SOURCE, cache_dir, report)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.packed_size.argtypes, library.packed_size.restype = [size, size], size
    library.pack.argtypes, library.pack.restype = [pointer, size, size, pointer], None
    library.linear.argtypes = [pointer, size, size, size, pointer, pointer, pointer, ctypes.c_int]
    library.linear.restype = None

    def pack(linear: nn.Module) -> nn.Module:
        weight = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
        assert isinstance(weight, Tensor)
        bias = linear.bias
        assert bias is None or isinstance(bias, Tensor)
        return NativeLinear(library, weight.detach(), None if bias is None else bias.detach())

    return pack


class NativeLinear(nn.Module):
    """y = x Wᵀ + b with W in the kernel's panels; no plain copy is kept."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [out_features, in_features], float32 on CPU; bias: [out_features]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.contiguous()
        self._packed = torch.empty(library.packed_size(self.in_features, self.out_features))
        library.pack(weight.data_ptr(), self.in_features, self.out_features, self._packed.data_ptr())
        self._bias = None if bias is None else bias.contiguous()
        self._linear = library.linear

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., num_rows, in_features] → [..., num_rows, out_features]."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        self._linear(
            x.data_ptr(),
            x.numel() // self.in_features,
            self.in_features,
            self.out_features,
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y
