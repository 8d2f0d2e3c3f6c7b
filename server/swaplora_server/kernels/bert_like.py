"""Layers of BERT's kind, and what kernels that compute them otherwise have to know of one.

h = norm(h + o(attend(q(h), k(h), v(h)))); h = norm(h + down(gelu(up(h))))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swaplora_server.kernels.backend import LayerAttention


@dataclass(frozen=True, slots=True)
class Parts:
    """One layer. Its linears and norms are wrapped modules: each has its base's, and a path and a number."""

    linears: tuple[Any, ...]  # q, k, v, o, up, down
    norms: tuple[Any, Any]  # LayerNorms, after attention and after the MLP
    num_heads: int
    scaling: float

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values alike."""
        return int(self.linears[0].out_features) // self.num_heads

    @property
    def attention(self) -> LayerAttention:
        """What it asks of its attention; no layer keeps anything, so all are the first."""
        return LayerAttention(0, self.scaling)


def layers_of(model: Any) -> tuple[Any, list[Parts]] | None:
    """What has the list `layer` of an encoder, and the parts of each; None if one of them is of another kind."""
    owner = getattr(model, "encoder", None) or getattr(model, "transformer", None)
    parts = [_parts_of(layer) for layer in getattr(owner, "layer", ())]
    known = [one for one in parts if one is not None]
    return (owner, known) if known and len(known) == len(parts) else None


def _parts_of(layer: Any) -> Parts | None:
    match type(layer).__name__:
        case "BertLayer" | "RobertaLayer" | "XLMRobertaLayer" if not (layer.is_decoder or layer.add_cross_attention):
            return _of_bert(layer) if _is_gelu(layer.intermediate.intermediate_act_fn) else None
        case "TransformerBlock":
            return _of_distilbert(layer) if _is_gelu(layer.ffn.activation) else None
        case _:
            return None


def _of_bert(layer: Any) -> Parts:
    own, output = layer.attention.self, layer.attention.output
    linears = own.query, own.key, own.value, output.dense, layer.intermediate.dense, layer.output.dense
    return Parts(linears, (output.LayerNorm, layer.output.LayerNorm), own.num_attention_heads, own.scaling)


def _of_distilbert(layer: Any) -> Parts:
    own, ffn = layer.attention, layer.ffn
    linears = own.q_lin, own.k_lin, own.v_lin, own.out_lin, ffn.lin1, ffn.lin2
    return Parts(linears, (layer.sa_layer_norm, layer.output_layer_norm), own.n_heads, own.scaling)


def _is_gelu(activation: Sequence[Any]) -> bool:
    """By erf, and not by what comes near it."""
    return type(activation).__name__ == "GELUActivation"
