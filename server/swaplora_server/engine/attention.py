"""Attention over paged keys and values, put into transformers' models through its attention interface.

A step's rows are packed one sequence after the other into [1, num_rows]. The model calls `paged_attention` once a
layer: the rows' keys and values go into the cache, then decoding rows attend in batches of like length and prompt
chunks one by one. Which rows belong to whom is settled once a step, in `PagedStep`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

IMPLEMENTATION = "swaplora_paged"
# what transformers passes along that does not change a causal forward without its own cache
_INERT = frozenset({"dropout", "position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"})


class UnsupportedAttentionError(ValueError):
    """The model asks its attention for something that is not honoured here; the message names it."""


class PagedKV:
    """Keys and values of every layer, in slots of `block_size` to a block. A layer is allocated when it first writes.

    Block 0 is zero for ever: padded reads point at it, so that whatever a freed block holds cannot reach a neighbour.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._num_slots = (num_blocks + 1) * block_size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Over all layers seen so far."""
        return sum(cache[0].numel() * cache.element_size() for layer in self._layers.values() for cache in layer)

    def write(self, layer_idx: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value [num_rows, num_kv_heads, head_dim] at `slots` and return the layer's whole caches."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (self._allocate(key), self._allocate(value))
        keys, values = self._layers[layer_idx]
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)
        return keys, values

    def _allocate(self, like: Tensor) -> Tensor:
        cache = like.new_empty(self._num_slots, *like.shape[1:])
        cache[: self.block_size] = 0
        return cache


@dataclass(slots=True)
class DecodeGroup:
    """Sequences that compute one row each, padded to the longest of the group."""

    rows: Tensor  # [num_sequences]: where their rows lie in the step
    slots: Tensor  # [num_sequences, max_length]: the cache slots they read, padded with slot 0
    lengths: Tensor  # [num_sequences, 1]: how many of them count
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """[num_sequences, 1, 1, max_length], true where the row may look."""
        if window not in self._masks:
            positions = torch.arange(self.slots.shape[1], device=self.slots.device)
            visible = positions < self.lengths
            if window is not None:
                visible &= positions >= self.lengths - window
            self._masks[window] = visible[:, None, None, :]
        return self._masks[window]


@dataclass(slots=True)
class PrefillRun:
    """A chunk of one prompt: rows [start, stop) of the step, at positions `first` and on of its sequence."""

    start: int
    stop: int
    first: int
    slots: Tensor  # [first + stop - start]: the sequence's cache slots up to the chunk's end
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """[1, 1, num_queries, num_keys], true where a row may look; None where plain causality says it all."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int | None) -> Tensor | None:
        num_keys = len(self.slots)
        if self.first == 0 and (window is None or window >= num_keys):
            return None
        keys = torch.arange(num_keys, device=self.slots.device)
        queries = keys[self.first :, None]
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        return visible[None, None]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer asks of its attention, the same for all of its rows."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None
    window: int | None

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup) -> Tensor:
        """One row a sequence. The query heads that share a KV head lie along the query-length axis."""
        num_kv_heads = keys.shape[1]
        # heads [num_heads] become [num_kv_heads, heads_per_kv_head]
        grouped = query[group.rows].reshape(len(group.rows), num_kv_heads, -1, query.shape[-1])
        sinks = None if self.sinks is None else self.sinks.view(1, num_kv_heads, -1, 1)
        out = self._attend(
            grouped,
            keys[group.slots].transpose(1, 2),
            values[group.slots].transpose(1, 2),
            group.mask(self.window),
            sinks,
        )
        return out.flatten(1, 2)

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, run: PrefillRun) -> Tensor:
        """One chunk of one prompt against everything before it and itself. → [num_queries, num_heads, head_dim]."""
        num_heads, heads_per_kv_head = query.shape[1], query.shape[1] // keys.shape[1]
        sinks = None if self.sinks is None else self.sinks.view(1, num_heads, 1, 1)
        out = self._attend(
            query[run.start : run.stop].transpose(0, 1).unsqueeze(0),
            keys[run.slots].repeat_interleave(heads_per_kv_head, dim=1).transpose(0, 1).unsqueeze(0),
            values[run.slots].repeat_interleave(heads_per_kv_head, dim=1).transpose(0, 1).unsqueeze(0),
            run.mask(self.window),
            sinks,
        )
        return out[0].transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Softmax attention; `mask` None means causal from the first key on. Shapes as torch's SDPA."""
        if self.softcap is None and sinks is None:
            return scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scaling
            )
        scores = (query @ key.transpose(-1, -2)).float() * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is None:
            return scores.softmax(-1).to(value.dtype) @ value
        with_sinks = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
        return with_sinks.softmax(-1)[..., :-1].to(value.dtype) @ value


# (query [num_rows, num_heads, head_dim], keys, values, group, layer, out [num_rows, num_heads, head_dim]) → whether it
# wrote the group's rows of `out`; what it has no code for it leaves to `LayerAttention.decode`
DecodeKernel = Callable[[Tensor, Tensor, Tensor, DecodeGroup, LayerAttention, Tensor], bool]


@dataclass(frozen=True, slots=True)
class PagedStep:
    """One step as attention sees it."""

    kv: PagedKV
    slot_mapping: Tensor  # [num_rows]: where each row's key and value are stored
    decodes: Sequence[DecodeGroup]
    prefills: Sequence[PrefillRun]
    kernel: DecodeKernel | None


_current: ContextVar[PagedStep | None] = ContextVar("paged_step", default=None)


@contextmanager
def use(step: PagedStep) -> Iterator[None]:
    """Hold `step` for the duration of one forward pass on this thread; refuses to nest and always clears."""
    if _current.get() is not None:
        raise RuntimeError("a step is already running on this thread")
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


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
    step = _current.get()
    if step is None:
        raise RuntimeError("paged attention ran outside of a step")
    _refuse_unknown(attention_mask, others)
    keys, values = step.kv.write(
        module.layer_idx,  # type: ignore[arg-type]
        step.slot_mapping,
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
    )
    layer = LayerAttention(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux, sliding_window)
    by_row = query[0].transpose(0, 1)  # [num_rows, num_heads, head_dim]
    out = query.new_empty(*by_row.shape[:2], value.shape[-1])
    for group in step.decodes:
        if step.kernel is None or not step.kernel(by_row, keys, values, group, layer, out):
            out[group.rows] = layer.decode(by_row, keys, values, group)
    for run in step.prefills:
        out[run.start : run.stop] = layer.prefill(by_row, keys, values, run)
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
    """Make `IMPLEMENTATION` known to transformers. The mask function returns None: masks are made here, per step."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_args, **_kwargs: None)
