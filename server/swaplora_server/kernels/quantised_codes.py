"""What bitsandbytes' linears hold: codes of 8 or 4 bits, and a scale for every block of them."""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

_BYTES, _NIBBLES = "Linear8bitLt", "Linear4bit"


@dataclass(frozen=True, slots=True)
class Codes:
    """W [out_features, in_features]: each value is its code, or what `table` has for it, times its block's scale."""

    codes: Tensor  # [out_features, in_features], int8, or uint8 below 16
    scales: Tensor  # [out_features, in_features / block], float32
    table: Tensor | None  # [16], float32, of 4-bit codes

    @property
    def block(self) -> int:
        """How many values of a row share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dense(self) -> Tensor:
        """W in float32."""
        values = self.codes.float() if self.table is None else self.table[self.codes.int()]
        blocks = values.view(*self.scales.shape, -1) * self.scales.unsqueeze(-1)
        return blocks.view(self.codes.shape)


def is_quantised(linear: nn.Module) -> bool:
    """Whether bitsandbytes made this linear."""
    return type(linear).__module__.startswith("bitsandbytes.") and type(linear).__name__ in {_BYTES, _NIBBLES}


def is_nibbles(linear: nn.Module) -> bool:
    """Whether the codes of a linear for which `is_quantised` have 4 bits."""
    return type(linear).__name__ == _NIBBLES


def has_blocks_across_rows(linear: Any) -> bool:
    """Whether a scale counts for the end of one row and the start of the next, where `is_nibbles`."""
    state = linear.weight.quant_state
    return bool(state.shape[1] % state.blocksize)


def codes_of(linear: nn.Module) -> Codes:
    """The weight of a linear for which `is_quantised`."""
    return _nibbles(linear) if is_nibbles(linear) else _bytes(linear)


def _bytes(linear: Any) -> Codes:
    # the first forward moves the scales from the weight to the state
    scales = linear.state.SCB if linear.weight.SCB is None else linear.weight.SCB
    return Codes(linear.weight.data, scales.unsqueeze(1) * (1.0 / 127.0), None)


def _nibbles(linear: Any) -> Codes:
    state = linear.weight.quant_state
    num_out, num_in = state.shape
    packed = linear.weight.data.view(torch.uint8).reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: num_out * num_in].view(num_out, num_in)
    # blocks go on from one row to the next; these divide rows and blocks alike
    block = gcd(state.blocksize, num_in)
    scales = _scales(state).repeat_interleave(state.blocksize // block)[: num_out * num_in // block]
    return Codes(codes, scales.view(num_out, -1), state.code.float())


def _scales(state: Any) -> Tensor:
    """One a block; with double quantisation they are codes themselves."""
    scales: Tensor = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.float()
