"""Attention of whole inputs, put into transformers' encoders through its attention interface."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from swaplora_server.engine.attention import UnsupportedAttentionError
from swaplora_server.engine.step import running
from swaplora_server.kernels.backend import LayerAttention

IMPLEMENTATION = "swaplora_whole"
# what transformers passes along that does not change a forward without dropout
_INERT = frozenset({"dropout", "position_ids", "use_cache", "is_causal", "output_attentions"})


def whole_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for a packed step of whole inputs.

    query, key, value: [1, num_heads, num_rows, head_dim]. Returns [1, num_rows, num_heads, head_dim]. Raises
    UnsupportedAttentionError for anything else that a model asks for.
    """
    unknown = sorted(
        name for name, given in others.items() if given is not None and given is not False and name not in _INERT
    )
    if attention_mask is not None or unknown or others.get("is_causal"):
        named = "a mask of its own" if attention_mask is not None else ", ".join(unknown) or "is_causal"
        raise UnsupportedAttentionError(f"the model's attention asks for {named}")
    layer = LayerAttention(
        layer_idx=0, scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, window=sliding_window
    )
    out = running().paged.attend(layer, *(rows[0].transpose(0, 1) for rows in (query, key, value)))
    return out.unsqueeze(0), None


class InterfaceLayers:
    """The layers of a model whose attention goes through transformers' interface."""

    of_distances: frozenset[str] = frozenset()  # see `DisentangledLayers`
    kept: Sequence[Tensor] = ()  # the same

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def put_in(self) -> None:
        """Have the model read packed steps from here on; without a mask function, since inputs are told apart here."""
        AttentionInterface.register(IMPLEMENTATION, whole_attention)
        self._model.set_attn_implementation(IMPLEMENTATION)

    def left_out(self) -> AbstractContextManager[None]:
        """One input is a step like any other."""
        return nullcontext()
