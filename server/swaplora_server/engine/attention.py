"""PagedAttention (vLLM), put into transformers' models through its attention interface.

A step's rows are packed one sequence after the other into [1, num_rows]. The model calls `paged_attention` once a
layer: the rows' keys and values go into the cache, then every row attends to its own sequence through its block table.
Which rows belong to whom is settled once a step. The kernels are the backend's: `kernels/torch/attention.py` and
`kernels/cpu/attention.py`. Sliding windows, softcaps and attention sinks are honoured; anything else is refused.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from swaplora_server.engine.step import running
from swaplora_server.kernels.backend import LayerAttention

IMPLEMENTATION = "swaplora_paged"
# what transformers passes along that does not change a causal forward without its own cache
_INERT = frozenset({"dropout", "position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"})


class UnsupportedAttentionError(ValueError):
    """The model asks its attention for something that is not honoured here; the message names it."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for a packed step.

    query: [1, num_heads, num_rows, head_dim]; key, value: [1, num_kv_heads, num_rows, head_dim]; s_aux: attention
    sinks, one logit a head. Returns [1, num_rows, num_heads, head_dim]. Raises UnsupportedAttentionError for anything
    else that a model asks for.
    """
    _refuse_unknown(attention_mask, others)
    layer = LayerAttention(
        layer_idx=module.layer_idx,  # type: ignore[arg-type]
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=s_aux,
        window=sliding_window,
    )
    out = running().paged.attend(layer, *(rows[0].transpose(0, 1) for rows in (query, key, value)))
    return out.unsqueeze(0), None


def _refuse_unknown(attention_mask: Tensor | None, others: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise UnsupportedAttentionError("the model adds a mask of its own to its attention, which is not supported")
    unknown = sorted(
        name for name, given in others.items() if given is not None and given is not False and name not in _INERT
    )
    if unknown or others.get("is_causal") is False:
        raise UnsupportedAttentionError(f"the model's attention asks for {', '.join(unknown) or 'is_causal=False'}")


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers, without a mask function: masks are made here, per step.

    For a name that has one, transformers looks in every forward whether sequences are packed, and a GPU has to answer.
    """
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
