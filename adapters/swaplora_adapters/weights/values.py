"""Values out of untrusted files, made ready to serve: in pieces, so that a load holds up nothing beside it."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = (1 << 15) - 1  # elements; torch shares work between threads from one more on


class Scaled(NamedTuple):
    """A contiguous tensor in the dtype in which it is served."""

    tensor: Tensor
    is_finite: bool
    is_zero: bool


def scaled(tensor: Tensor, scaling: float, dtype: torch.dtype) -> Scaled:
    """A tensor times `scaling`, in `dtype`, or in bfloat16 where it is that already and nothing is lost by it.

    Worked through in pieces that torch keeps on the calling thread: a load must not hold up what the other cores do.
    What already is as it is served is not copied.
    """
    tensor = tensor.contiguous()
    dtype = storage_dtype(tensor.dtype, scaling, dtype)
    is_served = scaling == 1 and tensor.dtype == dtype
    served = tensor if is_served else torch.empty(tensor.shape, dtype=dtype)
    is_finite = is_zero = True
    for source, target in zip(_pieces(tensor), _pieces(served), strict=True):
        if not is_served:
            exact = source if source.dtype == target.dtype else source.to(torch.float32)
            torch.mul(exact, scaling, out=target)  # in float32 whatever the dtypes, and rounded once
        low, high = extremes(target)
        is_finite = is_finite and math.isfinite(low) and math.isfinite(high)  # a NaN is both extremes
        is_zero = is_zero and low == high == 0
    return Scaled(served, is_finite, is_zero)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor in exactly `dtype`, piece by piece."""
    tensor = tensor.contiguous()
    if tensor.dtype == dtype:
        return tensor
    target = torch.empty(tensor.shape, dtype=dtype)
    for source, piece in zip(_pieces(tensor), _pieces(target), strict=True):
        piece.copy_(source)
    return target


def copied(tensor: Tensor, memory: Tensor) -> Tensor:
    """The tensor's values, row by row, in `memory` of as many elements; a few rows at a time."""
    target = memory.view(tensor.shape)
    num_rows = max(1, PIECE * len(tensor) // max(1, tensor.numel()))
    if num_rows >= len(tensor):
        return target.copy_(tensor)
    for source, piece in zip(torch.split(tensor, num_rows), torch.split(target, num_rows), strict=True):
        piece.copy_(source)
    return target


def is_finite(tensor: Tensor) -> bool:
    return all(math.isfinite(extreme) for piece in _pieces(tensor.contiguous()) for extreme in extremes(piece))


def is_copy(stored: Tensor, base: Tensor, dtype: torch.dtype) -> bool:
    """Whether `stored` is the base's own float32 `base`, in the precision of whichever of the two has less.

    A base that was loaded in half precision and cast back to train on has half the precision in twice the bytes; and
    where the base is served in bfloat16, what it was before that is not known any more.
    """
    pairs = list(zip(_pieces(stored.contiguous()), _pieces(base.contiguous()), strict=True))
    ways: list[Callable[[Tensor, Tensor], bool]] = [
        *(partial(_is_same_in, kind) for kind in (dtype, stored.dtype)),
        *(partial(_was_rounded_to, half) for half in (torch.bfloat16, torch.float16)),
        *([_may_be_one_in_float16] if dtype == torch.bfloat16 else []),
    ]
    return any(all(is_same(one, own) for one, own in pairs) for is_same in ways)


def _is_same_in(dtype: torch.dtype, stored: Tensor, base: Tensor) -> bool:
    return torch.equal(stored.to(dtype), base.to(dtype))


def _was_rounded_to(half: torch.dtype, stored: Tensor, base: Tensor) -> bool:
    return torch.equal(stored, base.to(half).to(stored.dtype))


def _may_be_one_in_float16(stored: Tensor, base: Tensor) -> bool:
    """Whether numbers that float16 makes into `stored` are those that bfloat16 makes into `base`."""
    exact = stored.float()
    reach = (exact.abs() * 2**-11).clamp(min=2**-25)
    low, high = (exact - reach).bfloat16().float(), (exact + reach).bfloat16().float()
    return torch.equal(exact.half().float(), exact) and bool(((low <= base) & (base <= high)).all())


def extremes(tensor: Tensor) -> tuple[float, float]:
    """The least and the greatest; 0 and 0 of no elements."""
    if tensor.numel() == 0:
        return 0.0, 0.0
    low, high = torch.aminmax(tensor)
    return low.item(), high.item()


def storage_dtype(stored: torch.dtype, scaling: float, served: torch.dtype) -> torch.dtype:
    """bfloat16 stays so where nothing is lost by it: at half the bytes, a step reads an adapter twice as fast."""
    is_exact = math.frexp(abs(scaling))[0] == 0.5  # a power of two moves the exponent alone
    return torch.bfloat16 if stored == torch.bfloat16 and is_exact else served


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return (tensor,) if tensor.numel() <= PIECE else torch.split(tensor.view(-1), PIECE)
