"""Linears for CPUs with a C++ compiler: W packed once, every row's result the same alone and among others.

Rows are float32; products are float32 (csrc/linear_fp32.cpp) or of bfloat16 (csrc/linear_bf16.cpp).
"""

import ctypes

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swaplora_server.kernels.backend import Memory
from swaplora_server.kernels.cpu.abi import Format, LinearJob, LinearWeight

_BF16_COLUMNS = 48  # of a panel, see csrc/linear_bf16.cpp


def pack(library: ctypes.CDLL, products: torch.dtype, linear: nn.Module, pages: Memory) -> nn.Module:
    """A packed stand-in for a float32 linear or Conv1D on CPU, its weights in `pages`.

    `products`: float32, which loses nothing, or bfloat16, to which W and what comes in are rounded.
    """
    weight = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
    assert isinstance(weight, Tensor)
    bias = linear.bias
    assert bias is None or isinstance(bias, Tensor)
    return CpuLinear(library, products, pages, weight.detach(), None if bias is None else bias.detach())


class CpuLinear(nn.Module):
    """y = x Wᵀ + b with W in the kernel's panels; no plain copy is kept."""

    _panels: Tensor

    def __init__(
        self,
        library: ctypes.CDLL,
        products: torch.dtype,
        pages: Memory,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        """weight: [out_features, in_features], float32 on CPU; bias: [out_features]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.contiguous()
        chosen = _format_of(weight, products)
        self.register_buffer("_panels", _packed(library, pages, weight, chosen), persistent=False)
        self._bias = None if bias is None else bias.contiguous()
        self.packed = LinearWeight(
            panels=self._panels.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            in_features=self.in_features,
            out_features=self.out_features,
            format=chosen,
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
        match self.packed.format:
            case Format.BF16:
                words = self._panels.view(-1, self._panels.numel() // self._num_panels // _BF16_COLUMNS, _BF16_COLUMNS)
                pairs = words[numbers // _BF16_COLUMNS, :, numbers % _BF16_COLUMNS]
                halves = torch.stack([pairs << 16, pairs & -(1 << 16)], dim=-1)
                return halves.view(torch.float32).flatten(1)[:, : self.in_features]
            case Format.FP32_OF_BF16:
                words = self._panels.view(-1, self.in_features, self._lanes)
                lane, half, panel = self._place(numbers)
                row = words[panel, :, lane]
                return torch.where(half[:, None] == 1, row & -(1 << 16), row << 16).view(torch.float32)
            case _:
                lane, half, panel = self._place(numbers)
                panels = self._panels.view(-1, self.in_features, 2 * self._lanes)
                return panels[panel, :, lane + half * self._lanes].view(torch.float32)

    @property
    def _num_panels(self) -> int:
        return -(-self.out_features // _BF16_COLUMNS)

    def _place(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lane, half and panel of columns in the layout of csrc/linear_fp32.cpp."""
        return numbers % self._lanes, numbers // self._lanes % 2, numbers // (2 * self._lanes)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., num_rows, in_features] → [..., num_rows, out_features]."""
        if x.dtype != torch.float32:
            raise TypeError(f"native linears take rows of float32, not of {x.dtype}")
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        self._job.y = y.data_ptr()
        rows = x.numel() // self.in_features
        self._linear(x.data_ptr(), rows, self.in_features, self._job, 1, None, 0, torch.get_num_threads())
        return y


def _format_of(weight: Tensor, products: torch.dtype) -> Format:
    if products == torch.bfloat16:
        return Format.BF16
    return Format.FP32_OF_BF16 if torch.equal(weight.bfloat16().float(), weight) else Format.FP32


def _packed(library: ctypes.CDLL, pages: Memory, weight: Tensor, chosen: Format) -> Tensor:
    """The panels of a weight [out_features, in_features]."""
    out_features, in_features = weight.shape
    if chosen == Format.BF16:
        panels = pages.empty(library.bf16_words(in_features, out_features), torch.int32)
        library.bf16_pack(weight.data_ptr(), in_features, out_features, panels.data_ptr())
        return panels
    is_bf16 = chosen == Format.FP32_OF_BF16
    panels = pages.empty(library.fp32_words(in_features, out_features, is_bf16), torch.int32)
    library.fp32_pack(weight.data_ptr(), in_features, out_features, is_bf16, panels.data_ptr())
    return panels
