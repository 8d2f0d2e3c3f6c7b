"""Where a linear's factors come to lie once they are read, checked and scaled, as whoever serves them wants them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from swaplora_adapters.weights.memory import HugePages
from swaplora_adapters.weights.served import LinearWeights, ModuleWeights
from swaplora_adapters.weights.values import copied, scaled


class Seen(NamedTuple):
    """What the values of a factor are, once it is scaled."""

    is_finite: bool
    is_zero: bool


class Placed(NamedTuple):
    """A linear's factors, and what was seen of both."""

    weights: LinearWeights
    of_A: Seen
    of_B: Seen


# (lora_A [rank, in_features], lora_B [out_features, rank], what to multiply lora_B by, the dtype to serve in) → both in
# the dtype that `values.scaled` gives them
Place = Callable[[Tensor, Tensor, float, torch.dtype], Placed]
# a `Place` into memory that is cut from these pages; the default puts each factor there as a plain tensor
Placement = Callable[[HugePages], Place]


def as_built(lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Placed:
    """A `Place` that leaves them where they are."""
    one, other = scaled(lora_A, 1.0, dtype), scaled(lora_B, scaling, dtype)
    return Placed(ModuleWeights(one.tensor, other.tensor), Seen(*one[1:]), Seen(*other[1:]))


def plain(device: torch.device, pages: HugePages) -> Place:
    """A `Place` for any device: as torch's own kernels read them, lora_B column by column."""

    def place(lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Placed:
        built = as_built(lora_A, lora_B, scaling, dtype)
        one, other = (placed(tensor, device, pages) for tensor in (built.weights.lora_A, built.weights.lora_B.t()))
        return built._replace(weights=ModuleWeights(one, other.t()))

    return place


def placed(tensor: Tensor, device: torch.device, pages: HugePages) -> Tensor:
    """A tensor, row by row, where steps read it."""
    if device.type != "cpu":
        return tensor.contiguous().to(device)
    return copied(tensor, pages.empty(tensor.numel(), tensor.dtype))
