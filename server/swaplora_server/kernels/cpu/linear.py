"""Float32 linears for CPUs with a C++ compiler: W packed once, every row's result the same alone and among others.

The kernel and its layout are in csrc/linear_fp32.cpp.
"""

import ctypes

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swaplora_server.kernels.backend import Memory
from swaplora_server.kernels.cpu.abi import Format, LinearJob, LinearWeight


def pack(library: ctypes.CDLL, linear: nn.Module, pages: Memory) -> nn.Module:
    """A packed stand-in for a float32 linear or Conv1D on CPU, its weights in `pages`."""
    weight = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
    assert isinstance(weight, Tensor)
    bias = linear.bias
    assert bias is None or isinstance(bias, Tensor)
    return CpuLinear(library, pages, weight.detach(), None if bias is None else bias.detach())


class CpuLinear(nn.Module):
    """y = x Wᵀ + b with W in the kernel's panels; no plain copy is kept."""

    _panels: Tensor

    def __init__(self, library: ctypes.CDLL, pages: Memory, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [out_features, in_features], float32 on CPU; bias: [out_features]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.contiguous()
        is_bf16 = torch.equal(weight.bfloat16().float(), weight)
        num_words = library.fp32_words(self.in_features, self.out_features, is_bf16)
        self.register_buffer("_panels", pages.empty(num_words, torch.int32), persistent=False)
        library.fp32_pack(weight.data_ptr(), self.in_features, self.out_features, is_bf16, self._panels.data_ptr())
        self._bias = None if bias is None else bias.contiguous()
        self.packed = LinearWeight(
            panels=self._panels.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            in_features=self.in_features,
            out_features=self.out_features,
            format=Format.FP32_OF_BF16 if is_bf16 else Format.FP32,
        )
        self._lanes = library.lanes()
        self._job = LinearJob(ctypes.pointer(self.packed), None)
        self._linear = library.linear

    @property
    def bias(self) -> Tensor | None:
        """[out_features]."""
        return self._bias

    def dense(self) -> Tensor:
        """[out_features, in_features]: W as a plain copy."""
        return self.rows(torch.arange(self.out_features))

    def rows(self, numbers: Tensor) -> Tensor:
        """[num_rows] → [num_rows, in_features]: rows of W."""
        lane, half = numbers % self._lanes, numbers // self._lanes % 2
        panel = numbers // (2 * self._lanes)
        if self.packed.format == Format.FP32:
            panels = self._panels.view(-1, self.in_features, 2 * self._lanes)
            return panels[panel, :, lane + half * self._lanes].view(torch.float32)
        words = self._panels.view(-1, self.in_features, self._lanes)[panel, :, lane]
        return torch.where(half[:, None] == 1, words & -(1 << 16), words << 16).view(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., num_rows, in_features] → [..., num_rows, out_features]."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        self._job.y = y.data_ptr()
        rows = x.numel() // self.in_features
        self._linear(x.data_ptr(), rows, self.in_features, self._job, 1, None, 0, torch.get_num_threads())
        return y
