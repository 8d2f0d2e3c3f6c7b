"""Linears of 8 and 4 bits for CPUs with a C++ compiler: weights stay codes, and are multiplied as such.

The kernels and their layouts are in csrc/linear_int8.cpp and csrc/linear_four_bit.cpp.
"""

import ctypes

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from swaplora_server.kernels.backend import Memory
from swaplora_server.kernels.cpu.abi import Format, LinearJob, LinearWeight
from swaplora_server.kernels.quantised_codes import Codes, codes_of

_BYTE_COLUMNS, _BYTE_DEPTH = 32, 64  # of a panel, as in linear_int8.cpp, and what its depth is a multiple of
_NIBBLE_COLUMNS, _NIBBLES = 64, 8  # of a panel, as in linear_four_bit.cpp, and of a word


def pack(library: ctypes.CDLL, linear: nn.Module, pages: Memory) -> nn.Module:
    """A packed stand-in for bitsandbytes' linear on CPU, its weights in `pages`."""
    bias = linear.bias
    assert bias is None or isinstance(bias, Tensor)
    return QuantisedLinear(library, pages, codes_of(linear), None if bias is None else bias.detach().float())


class QuantisedLinear(nn.Module):
    """y = x Wᵀ + b in float32, with W in codes; x and y are of any floating type."""

    _panels: Tensor
    _scales: Tensor

    def __init__(self, library: ctypes.CDLL, pages: Memory, weight: Codes, bias: Tensor | None) -> None:
        """bias: [out_features], float32."""
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        is_bytes = weight.table is None
        panels = _byte_panels(weight.codes) if is_bytes else _nibble_panels(weight.codes, weight.block)
        scales = _in_panels(weight.scales, _BYTE_COLUMNS if is_bytes else _NIBBLE_COLUMNS)
        self.register_buffer("_panels", _kept(panels, pages), persistent=False)
        self.register_buffer("_scales", _kept(scales, pages), persistent=False)
        self._table = None if weight.table is None else weight.table.contiguous()
        self._bias = None if bias is None else bias.contiguous()
        self.packed = LinearWeight(
            panels=self._panels.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            scales=self._scales.data_ptr(),
            table=None if self._table is None else self._table.data_ptr(),
            in_features=self.in_features,
            out_features=self.out_features,
            format=Format.INT8 if is_bytes else Format.FOUR_BIT,
            block=weight.block,
        )
        self._linear = library.linear

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., num_rows, in_features] → [..., num_rows, out_features]."""
        wide = x.float().contiguous()
        y = wide.new_empty(*x.shape[:-1], self.out_features)
        num_rows = x.numel() // self.in_features
        job = LinearJob(ctypes.pointer(self.packed), y.data_ptr())
        self._linear(wide.data_ptr(), num_rows, self.in_features, job, 1, None, 0, torch.get_num_threads())
        return y.to(x.dtype)

    @property
    def bias(self) -> Tensor | None:
        """[out_features]."""
        return self._bias

    def dense(self) -> Tensor:
        """W [out_features, in_features] in float32, as `forward` multiplies with it."""
        is_bytes = self._table is None
        codes = _bytes_of(self._panels) if is_bytes else _nibbles_of(self._panels, self.packed.block)
        scales = self._scales.transpose(1, 2).flatten(0, 1)[: self.out_features]
        return Codes(codes[: self.out_features, : self.in_features].contiguous(), scales, self._table).dense()


def _byte_panels(codes: Tensor) -> Tensor:
    """[out_features, in_features], int8 → [num_panels, in_features / 4, columns, 4], uint8 above by 128.

    `in_features` are filled up to whole tiles of AMX.
    """
    num_out, num_in = codes.shape
    padded = pad(codes.view(torch.uint8) ^ 128, (0, -num_in % _BYTE_DEPTH, 0, -num_out % _BYTE_COLUMNS), value=128)
    return padded.view(-1, _BYTE_COLUMNS, padded.shape[1] // 4, 4).transpose(1, 2)


def _bytes_of(panels: Tensor) -> Tensor:
    """Undo `_byte_panels`; what was filled up is there too."""
    return (panels.transpose(1, 2).flatten(2).flatten(0, 1) ^ 128).view(torch.int8)


def _nibble_panels(codes: Tensor, block: int) -> Tensor:
    """[out_features, in_features] below 16 → [num_panels, words, columns], int32: eight codes each, block by block."""
    num_out = len(codes)
    blocks = pad(codes.view(num_out, -1, block), (0, -block % _NIBBLES)).view(num_out, -1, _NIBBLES)
    words = torch.zeros(blocks.shape[:-1], dtype=torch.int32)
    for number in range(_NIBBLES):
        words |= blocks[..., number].int() << 4 * number
    return _in_panels(words, _NIBBLE_COLUMNS)


def _nibbles_of(panels: Tensor, block: int) -> Tensor:
    """Undo `_nibble_panels`; rows that were filled up are there too."""
    words = panels.transpose(1, 2).flatten(0, 1)
    codes = torch.stack([words >> 4 * number & 15 for number in range(_NIBBLES)], dim=-1).to(torch.uint8)
    return codes.view(len(words), -1, block + -block % _NIBBLES)[..., :block].flatten(1)


def _in_panels(values: Tensor, num_columns: int) -> Tensor:
    """[out_features, n] → [num_panels, n, num_columns], the last panel filled up with zeros."""
    padded = pad(values, (0, 0, 0, -len(values) % num_columns))
    return padded.view(-1, num_columns, values.shape[1]).transpose(1, 2)


def _kept(tensor: Tensor, pages: Memory) -> Tensor:
    """A contiguous copy in `pages`."""
    return pages.empty(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)
