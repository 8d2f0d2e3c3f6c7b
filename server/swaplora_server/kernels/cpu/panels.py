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
_NOT_FINITE, _NOT_ZERO = 1, 2


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
        """The same factors with these."""
        return replace(self, column_scale=column_scale, shift=shift)


def placement(library: ctypes.CDLL, dtype: torch.dtype) -> Placement:
    """Panels cut from an adapter's pages, written in one native pass over what the file has.

    `dtype` is the number format of the base's products: where that is bfloat16, what is stored in more is rounded to it
    once, and a step reads half the bytes.
    """

    def into(pages: HugePages) -> Place:
        def place(lora_A: Tensor, lora_B: Tensor, scaling: float, rows: torch.dtype) -> Placed:
            served = rows if dtype == torch.float32 else dtype
            panels_A, of_A = _laid(library, lora_A, 1.0, served, RANKS, pages)
            panels_B, of_B = _laid(library, lora_B, scaling, served, COLUMNS, pages)
            rank, in_features = lora_A.shape
            return Placed(PanelWeights(panels_A, panels_B, rank, in_features, len(lora_B)), of_A, of_B)

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


def _laid(
    library: ctypes.CDLL, factor: Tensor, scaling: float, dtype: torch.dtype, widest: int, pages: HugePages
) -> tuple[Tensor, Seen]:
    """A factor times `scaling`, in panels of `widest` rows."""
    factor = factor.contiguous()
    num_rows, depth = factor.shape
    panels = pages.empty(factor.numel(), storage_dtype(factor.dtype, scaling, dtype))
    is_bf16 = panels.dtype == torch.bfloat16
    seen = library.place_factor(
        factor.data_ptr(), _KINDS[factor.dtype], num_rows, depth, widest, scaling, is_bf16, panels.data_ptr()
    )
    return panels, Seen(not seen & _NOT_FINITE, not seen & _NOT_ZERO)
