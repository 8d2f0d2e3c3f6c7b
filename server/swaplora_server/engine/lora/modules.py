"""The wrapped modules: the base's own, with what the running step's adapters add to them or have in their place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swaplora_adapters.weights.served import EmbeddingWeights
from swaplora_server.engine.lora.routing import replaced_rows, routed
from swaplora_server.engine.step import running
from swaplora_server.kernels.step import Segment


class Wrapped(nn.Module):
    """A module of the base that adapters may change. The base is never written, and all that is read of it is its own.

    `path` is the module's exact name in the model, `number` its place in the tables of adapters.
    """

    def __init__(self, path: str, number: int, base: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.number = number
        self.base = base

    def __getattr__(self, name: str) -> Any:
        """Let a model read what it would of its own module (`weight`, `in_features`, …)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class LoraLinear(Wrapped):
    """y = (base(x) + Σ scale · (x Aᵀ) Bᵀ) · column_scale + scale · shift over the step's segments.

    A: [rank, in_features], B: [out_features, rank]; column_scale is DoRA's, shift an adapter's biases. Base rows are
    left alone.
    """

    def __init__(self, path: str, number: int, base: nn.Module, *, is_head: bool, is_transposed: bool) -> None:
        """`is_transposed`: the model stores the weight as [in_features, out_features]."""
        super().__init__(path, number, base)
        self.is_head = is_head
        self.is_transposed = is_transposed
        self.joined: Callable[[LoraLinear, Tensor], Tensor] | None = None  # its output, multiplied with others'

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., num_rows, in_features] → [..., num_rows, out_features]."""
        if self.joined is not None:
            return self.joined(self, x)
        rows = running().head if self.is_head else running().tokens
        y: Tensor = routed(self.base, replaced_rows(rows.segments, self.path), x.ndim - 2, (x,))
        if rows.lora is not None:
            rows.lora.add(x.reshape(-1, x.shape[-1]), [(y.view(-1, y.shape[-1]), self.number)])
        return y


class LoraEmbedding(Wrapped):
    """y = base(ids) + Σ scale · A[ids] Bᵀ over the step's segments, and an adapter's own rows for its own tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [1, num_rows] → [1, num_rows, embedding_dim]."""
        segments = running().tokens.segments
        y: Tensor = routed(self.base, replaced_rows(segments, self.path), 1, (ids,))
        for segment in segments.embedding:
            own = segment.weights.embeddings.get(self.path)
            if own is not None:
                self._change(y[0, segment.start : segment.stop], ids[0, segment.start : segment.stop], own, segment)
        return y

    def _change(self, y: Tensor, ids: Tensor, own: EmbeddingWeights, segment: Segment) -> None:
        """Write an adapter's rows and delta into y [num_rows, embedding_dim], one rank after the other.

        So the order of a row's sum does not depend on how many rows there are.
        """
        factor = getattr(self.base, "embed_scale", 1.0)  # some models scale what they look up
        if own.token_ids is not None and own.token_rows is not None:
            at = torch.searchsorted(own.token_ids, ids).clamp(max=len(own.token_ids) - 1)
            is_own = own.token_ids[at] == ids
            y[is_own] = (own.token_rows[at[is_own]].float() * factor).to(y.dtype)
        if own.rank:
            delta = y.new_zeros(y.shape, dtype=torch.float32)
            for column, row in zip(own.lora_A[ids].float().t(), own.lora_B.float().t(), strict=True):
                delta.addcmul_(column[:, None], row)
            y.copy_(y.float() + delta * factor * segment.scale)


class Replaceable(Wrapped):
    """A module that works row by row, such as a norm, and that an adapter may bring its own of."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Rows are the first dimension of flat inputs, [num_rows, …], and the second of others, [1, num_rows, …]."""
        replaced = replaced_rows(running().tokens.segments, self.path)
        return routed(self.base, replaced, row_dim(inputs[0]), inputs, options)


def row_dim(x: Tensor) -> int:
    """Which dimension of a module's input the rows of a packed step are."""
    return 1 if x.ndim > 2 else 0
