"""An adapter's factors in the panels that csrc/lora reads straight through; csrc/lora/panels.h says how they lie.

A factor is [rows, depth]: lora_A [rank, in_features], lora_B [out_features, rank].
"""

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swaplora_adapters.weights.memory import HugePages
from swaplora_adapters.weights.placement import Place, Placed, Placement, Seen
from swaplora_adapters.weights.served import LinearWeights
from swaplora_adapters.weights.values import storage_dtype

RANKS, COLUMNS = 16, 48  # rows of a panel of lora_A, and of lora_B
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/lora/factors.cpp
_SEEN = [Seen(not bits & 1, not bits & 2) for bits in range(4)]  # NOT_FINITE, NOT_ZERO


@dataclass(frozen=True, slots=True, eq=False)
class PanelWeights:
    """`LinearWeights` with both factors in panels."""

    panels_A: Tensor  # [rank * in_features]
    panels_B: Tensor  # [out_features * rank]
    rank: int
    in_features: int
    out_features: int
    column_scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def lora_A(self) -> Tensor:
        """[rank, in_features], taken out of the panels."""
        return dense(self.panels_A, self.rank, self.in_features, RANKS)

    @property
    def lora_B(self) -> Tensor:
        """[out_features, rank], taken out of the panels."""
        return dense(self.panels_B, self.out_features, self.rank, COLUMNS)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held in memory."""
        parts = (self.panels_A, self.panels_B, self.column_scale, self.shift)
        return tuple(tensor for tensor in parts if tensor is not None)

    def with_vectors(self, column_scale: Tensor | None, shift: Tensor | None) -> "PanelWeights":
        """See `LinearWeights.with_vectors`."""
        return replace(self, column_scale=column_scale, shift=shift)


def placement(library: ctypes.CDLL, dtype: torch.dtype) -> Placement:
    """Panels cut from an adapter's pages, written in one native pass over what the file has.

    `dtype` is the number format of the base's products: where that is bfloat16, what is stored in more is rounded to it
    once, and a step reads half the bytes.
    """

    def into(pages: HugePages) -> Place:
        def place(lora_A: Tensor, lora_B: Tensor, scaling: float, rows: torch.dtype) -> Placed:
            served = rows if dtype == torch.float32 else dtype
            lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
            rank, in_features = lora_A.shape
            out_features = lora_B.shape[0]
            panels_A, A = _factor(lora_A, storage_dtype(lora_A.dtype, 1.0, served), pages)
            panels_B, B = _factor(lora_B, storage_dtype(lora_B.dtype, scaling, served), pages)
            seen = library.place_factors(rank, in_features, out_features, scaling, *A, *B)
            of_A, of_B = _SEEN[seen & 3], _SEEN[seen >> 2]
            return Placed(PanelWeights(panels_A, panels_B, rank, in_features, out_features), of_A, of_B)

        return place

    return into


def in_panels(library: ctypes.CDLL, dtype: torch.dtype, weights: LinearWeights) -> PanelWeights:
    """The same weights with their factors in panels, for products of `dtype`; copied unless they are in them."""
    if isinstance(weights, PanelWeights):
        return weights
    place = placement(library, dtype)(HugePages(0))
    laid, _, _ = place(weights.lora_A, weights.lora_B, 1.0, torch.float32)
    assert isinstance(laid, PanelWeights)
    return laid.with_vectors(weights.column_scale, weights.shift)


def dense(panels: Tensor, num_rows: int, depth: int, widest: int) -> Tensor:
    """[num_rows, depth] out of panels of `widest` rows."""
    factor = torch.empty(num_rows, depth, dtype=panels.dtype)
    together = 2 if panels.dtype == torch.bfloat16 else 1  # numbers along the depth that share a word
    whole = depth - depth % together
    starts = range(0, num_rows if depth else 0, widest)
    for first in starts:
        rows, panel = factor[first : first + widest], panels[first * depth : (first + widest) * depth]
        body, end = panel[: whole * len(rows)], panel[whole * len(rows) :]
        rows[:, :whole] = body.view(-1, len(rows), together).transpose(0, 1).flatten(1)
        rows[:, whole:] = end.view(-1, len(rows)).t()
    return factor


def _factor(factor: Tensor, dtype: torch.dtype, pages: HugePages) -> tuple[Tensor, tuple[int, int, bool, int]]:
    """Memory for the panels, and both as csrc/lora/factors.cpp takes them."""
    panels = pages.empty(factor.numel(), dtype)
    return panels, (factor.data_ptr(), _KINDS[factor.dtype], dtype == torch.bfloat16, panels.data_ptr())
