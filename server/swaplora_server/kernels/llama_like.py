"""Layers of Llama's kind, and what kernels that compute them otherwise have to know of one.

x = norm(h); h = h + o(attend(rope(q(x)), rope(k(x)), v(x)))
x = norm(h); h = h + down(silu(gate(x)) · up(x))

RMSNorms, the angles of rope for whole heads; some norm each head of queries and keys before they are turned.
"""

from dataclasses import dataclass
from typing import Any

from swaplora_server.kernels.backend import LayerAttention

# layers that compute this and nothing else
_KNOWN = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Parts:
    """One layer. Its linears and norms are wrapped modules: each has its base's, and a path and a number."""

    layer: Any
    linears: tuple[Any, ...]  # q, k, v, o, gate, up, down
    norms: tuple[Any, Any, Any, Any]  # before attention, before the MLP; of query and key heads, or None
    eps: float

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values alike."""
        size: int = self.layer.self_attn.head_dim
        return size

    @property
    def num_heads(self) -> int:
        """Of queries."""
        return int(self.linears[0].out_features) // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """Of keys, and of values."""
        return int(self.linears[1].out_features) // self.head_dim

    @property
    def attention(self) -> LayerAttention:
        """What it asks of its attention now: the proof at start shortens windows for a while."""
        attn = self.layer.self_attn
        window = getattr(attn, "sliding_window", None)
        if type(self.layer).__name__ == "MistralDecoderLayer":
            window = getattr(attn.config, "sliding_window", None)
        return LayerAttention(attn.layer_idx, attn.scaling, window=window)


def parts_of(layer: Any) -> Parts | None:
    """None for a layer of another kind."""
    if type(layer).__name__ not in _KNOWN or type(layer.mlp.act_fn).__name__ not in {"SiLU", "SiLUActivation"}:
        return None
    attn = layer.self_attn
    linears = *(getattr(attn, name) for name in _ATTENTION), *(getattr(layer.mlp, name) for name in _MLP)
    of_heads = (getattr(attn, name, None) for name in ("q_norm", "k_norm"))
    norms = layer.input_layernorm, layer.post_attention_layernorm, *of_heads
    return Parts(layer, linears, norms, layer.input_layernorm.variance_epsilon)


def all_parts_of(decoder: Any) -> list[Parts] | None:
    """Those of all its layers; None if one of them is of another kind."""
    parts = [parts_of(layer) for layer in getattr(decoder, "layers", ())]
    known = [one for one in parts if one is not None]
    return known if known and len(known) == len(parts) else None
