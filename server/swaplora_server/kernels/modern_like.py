"""Layers of ModernBERT's kind, and what kernels that compute them otherwise have to know of one.

x = norm(h); q, k, v = qkv(x); h = h + o(attend(rope(q), rope(k), v))
x = norm(h); a, b = up(x); h = h + down(gelu(a) · b)

LayerNorms, of which the first layer's first is left out; the angles of rope for whole heads.
"""

from dataclasses import dataclass
from typing import Any

from swaplora_server.kernels.backend import LayerAttention


@dataclass(frozen=True, slots=True)
class Parts:
    """One layer. Its linears and norms are wrapped modules: each has its base's, and a path and a number."""

    layer: Any
    linears: tuple[Any, ...]  # qkv, o, up, down
    norms: tuple[Any, Any]  # before attention, or None; before the MLP

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values alike."""
        return int(self.layer.attn.head_dim)

    @property
    def num_heads(self) -> int:
        """Of queries, keys and values alike."""
        return int(self.linears[1].in_features) // self.head_dim

    @property
    def attention(self) -> LayerAttention:
        """What it asks of its attention; no layer keeps anything, so all are the first."""
        return LayerAttention(0, self.head_dim**-0.5, window=self.layer.attn.sliding_window)


def layers_of(model: Any) -> list[Parts] | None:
    """The parts of each of its layers; None if one of them is of another kind."""
    layers = getattr(model, "layers", ())
    if not len(layers) or {type(layer).__name__ for layer in layers} != {"ModernBertEncoderLayer"}:
        return None
    if {type(layer.mlp.act).__name__ for layer in layers} != {"GELUActivation"}:  # by erf, not by what comes near it
        return None
    return [_parts_of(layer) for layer in layers]


def _parts_of(layer: Any) -> Parts:
    first = layer.attn_norm if hasattr(layer.attn_norm, "weight") else None
    return Parts(layer, (layer.attn.Wqkv, layer.attn.Wo, layer.mlp.Wi, layer.mlp.Wo), (first, layer.mlp_norm))
