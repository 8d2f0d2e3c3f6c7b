"""Linears of 8 and 4 bits for CPUs with a C++ compiler: float32 products of weights that stay small."""

import ctypes

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from swaplora_server.kernels.cpu.abi import Format, LinearJob, LinearWeight
from swaplora_server.kernels.quantised_codes import Codes, codes_of


def pack(library: ctypes.CDLL, linear: nn.Module) -> nn.Module:
    """A packed stand-in for bitsandbytes' linear on CPU."""
    bias = linear.bias
    assert bias is None or isinstance(bias, Tensor)
    return QuantisedLinear(library, codes_of(linear), None if bias is None else bias.detach().float())


class QuantisedLinear(nn.Module):
    """y = x Wᵀ + b in float32, with W in codes; x and y are of any floating type."""

    _codes: Tensor
    _scales: Tensor

    def __init__(self, library: ctypes.CDLL, weight: Codes, bias: Tensor | None) -> None:
        """bias: [out_features], float32."""
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        lanes = library.lanes()
        num_columns = 2 * lanes
        codes = _in_panels(weight.codes.view(torch.uint8), num_columns)
        self.register_buffer("_codes", codes if weight.table is None else _in_halves(codes, lanes), persistent=False)
        self.register_buffer("_scales", _in_panels(weight.scales, num_columns), persistent=False)
        self._table = weight.table
        self._bias = bias
        self.packed = LinearWeight(
            panels=self._codes.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            scales=self._scales.data_ptr(),
            table=None if weight.table is None else weight.table.data_ptr(),
            in_features=self.in_features,
            out_features=self.out_features,
            format=Format.INT8 if weight.table is None else Format.FOUR_BIT,
            block=weight.block,
        )
        self._library = library

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., num_rows, in_features] → [..., num_rows, out_features]."""
        wide = x.float().contiguous()
        y = wide.new_empty(*x.shape[:-1], self.out_features)
        num_rows = x.numel() // self.in_features
        job = LinearJob(ctypes.pointer(self.packed), y.data_ptr())
        self._library.linear(wide.data_ptr(), num_rows, self.in_features, job, 1, None, 0, torch.get_num_threads())
        return y.to(x.dtype)

    @property
    def bias(self) -> Tensor | None:
        """[out_features]."""
        return self._bias

    def dense(self) -> Tensor:
        """W [out_features, in_features] in float32, as `forward` multiplies with it."""
        num_panels, _, num_columns = self._scales.shape
        wide = torch.empty(num_panels, self.in_features, num_columns)
        self._library.widen(self.packed, wide.data_ptr())
        return wide.transpose(1, 2).reshape(-1, self.in_features)[: self.out_features].contiguous()


def _in_panels(values: Tensor, num_columns: int) -> Tensor:
    """[out_features, n] → [num_panels, n, num_columns], the last panel filled up with zeros."""
    padded = pad(values, (0, 0, 0, -len(values) % num_columns))
    return padded.view(-1, num_columns, values.shape[1]).transpose(1, 2).contiguous()


def _in_halves(codes: Tensor, lanes: int) -> Tensor:
    """[…, num_columns] below 16 → […, num_columns / 2]: of every 2 · lanes, columns c and lanes + c share a byte."""
    pairs = codes.view(*codes.shape[:-1], -1, 2, lanes)
    return (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2)
