"""The wrapped modules: the base's own, with what the running step's adapters add to them or have in their place."""

from typing import Any

import torch
from torch import Tensor, nn

from swaplora_adapters.weights.served import EmbeddingWeights
from swaplora_server.engine.lora.activation import Activation
from swaplora_server.engine.lora.routing import replaced_rows, routed
from swaplora_server.kernels.rows import Segment


class Wrapped(nn.Module):
    """A module of the base that adapters may change. The base is never written, and all that is read of it is its own.

    `path` is the module's exact name in the model, `number` its place in the activation's tables.
    """

    def __init__(self, path: str, base: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.path = path
        self.base = base
        self.number = activation.number(path)
        self._activation = activation

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

    def __init__(
        self, path: str, base: nn.Module, activation: Activation, *, is_head: bool, is_transposed: bool
    ) -> None:
        """`is_transposed`: the model stores the weight as [in_features, out_features]."""
        super().__init__(path, base, activation)
        self.is_head = is_head
        self.is_transposed = is_transposed

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., num_rows, in_features] → [..., num_rows, out_features]."""
        rows = self._activation.step.head if self.is_head else self._activation.step.tokens
        y: Tensor = routed(self.base, replaced_rows(rows, self.path), x.ndim - 2, (x,))
        self._activation.add_delta(self.number, y, x, rows)
        return y


class LoraEmbedding(Wrapped):
    """y = base(ids) + Σ scale · A[ids] Bᵀ over the step's segments, and an adapter's own rows for its own tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [1, num_rows] → [1, num_rows, embedding_dim]."""
        rows = self._activation.step.tokens
        y: Tensor = routed(self.base, replaced_rows(rows, self.path), 1, (ids,))
        for segment in rows.embedding:
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
        replaced = replaced_rows(self._activation.step.tokens, self.path)
        return routed(self.base, replaced, row_dim(inputs[0]), inputs, options)


def row_dim(x: Tensor) -> int:
    """Which dimension of a module's input the rows of a packed step are."""
    return 1 if x.ndim > 2 else 0
