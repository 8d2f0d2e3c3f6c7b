"""Layers of DeBERTa's kind, and what the attention of packed inputs has to know of one.

Its scores are of content and of how far apart two tokens are, by rows of a table of distances behind linears of the
layer: those of its queries and keys, or two of their own (arXiv:2006.03654).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swaplora_server.engine.attention import UnsupportedAttentionError
from swaplora_server.engine.lora.modules import LoraLinear

ATTENTION = "DisentangledSelfAttention"


@dataclass(frozen=True, slots=True)
class Parts:
    """One layer's attention."""

    module: nn.Module
    heads: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # [1, num_rows, hidden_size] → q, k, v [.., heads, dim]
    num_heads: int
    num_terms: int  # of a score
    names: tuple[str | None, str | None]  # linears that make keys and queries of distances, where there are such

    @property
    def of_keys(self) -> LoraLinear | None:
        """What makes keys of distances, wrapped by now."""
        return self._linear(self.names[0])

    @property
    def of_queries(self) -> LoraLinear | None:
        """The same of queries."""
        return self._linear(self.names[1])

    def _linear(self, name: str | None) -> LoraLinear | None:
        linear = None if name is None else getattr(self.module, name)
        assert linear is None or isinstance(linear, LoraLinear)
        return linear

    @property
    def of_distances(self) -> list[LoraLinear]:
        """Those that there are."""
        return [linear for linear in (self.of_keys, self.of_queries) if linear is not None]


def encoder_of(model: nn.Module) -> Any:
    """What has the layers of a model of this kind; None of another."""
    encoder: Any = getattr(model, "encoder", None)
    layers = getattr(encoder, "layer", ())
    return encoder if layers and type(getattr(layers[0].attention, "self", None)).__name__ == ATTENTION else None


def parts_of(layer: Any) -> Parts:
    """Raises UnsupportedAttentionError for heads that talk to each other."""
    own = layer.attention.self
    if getattr(own, "talking_head", False):
        raise UnsupportedAttentionError("the model's attention asks for talking_head")
    kinds = own.pos_att_type
    is_first = hasattr(own, "in_proj")  # of the two versions
    keys, queries = ("pos_proj", "pos_q_proj") if is_first else ("pos_key_proj", "pos_query_proj")
    if getattr(own, "share_att_key", False):
        keys, queries = "key_proj", "query_proj"
    return Parts(
        own,
        _Joined(own) if is_first else _Apart(own),
        own.num_attention_heads,
        1 + (len(kinds) if is_first else ("c2p" in kinds) + ("p2c" in kinds)),
        (
            keys if own.relative_attention and "c2p" in kinds else None,
            queries if own.relative_attention and "p2c" in kinds else None,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Joined:
    """Of the first version: one linear, head by head."""

    own: Any

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.own
        query, key, value = own.in_proj(rows)[0].unflatten(-1, (own.num_attention_heads, -1)).chunk(3, dim=-1)
        like = query.shape[1:]
        return query + own.q_bias.view(like), key, value + own.v_bias.view(like)


@dataclass(frozen=True, slots=True)
class _Apart:
    """Of the second: a linear each."""

    own: Any

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.own
        query, key, value = (
            linear(rows)[0].unflatten(-1, (own.num_attention_heads, -1))
            for linear in (own.query_proj, own.key_proj, own.value_proj)
        )
        return query, key, value


def table_of(encoder: Any) -> Tensor:
    """The rows of distances that all layers share, [num_distances, hidden_size]; one that nobody reads, for want."""
    table: Tensor | None = encoder.get_rel_embedding()
    return torch.zeros(1, 1) if table is None else table.detach()


def rows_of_distances(encoder: Any, max_positions: int) -> Tensor:
    """Which row of the table is of each distance, [2 · max_positions - 1]; the middle one is of a token to itself.

    Asked of the model's own code, for one token before many and behind them. Rows do not descend with distances.
    """
    if not encoder.relative_attention:
        return torch.zeros(2 * max_positions - 1, dtype=torch.int64)
    own = encoder.layer[0].attention.self
    one, many = torch.empty(1, 1, 1), torch.empty(1, max_positions, 1)
    before, behind = encoder.get_rel_pos(many, one)[0, 0], encoder.get_rel_pos(one, many)[0, :, 0]
    span = getattr(own, "pos_ebd_size", own.max_relative_positions)
    distances = torch.cat([before.flip(0)[:-1], behind]).long()
    return torch.clamp(distances + span, 0, 2 * span - 1)
