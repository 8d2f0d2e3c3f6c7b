"""PagedAttention in torch's own operations, on any device: GQA, sliding window, softcap, attention sinks.

Decode rows attend in batches of like length, prefill chunks one by one. Which rows belong to whom is settled once a
step, in `TorchStep`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from swaplora_server.kernels.backend import LayerAttention, StepInputs
from swaplora_server.kernels.step import Ints, Runs, StepPlan


class TorchKV:
    """Keys and values of every layer, in slots of `block_size` to a block. A layer is allocated when it first writes.

    Block 0 is zero for ever: padded reads point at it, so that whatever a freed block holds cannot reach a neighbour.
    """

    def __init__(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self._device = device
        self._num_slots = (num_blocks + 1) * block_size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Over all layers seen so far."""
        return sum(cache[0].numel() * cache.element_size() for layer in self._layers.values() for cache in layer)

    def step(self, runs: Runs) -> "TorchStep":
        """What a step of `runs` reads and writes."""
        decodes: list[tuple[int, Ints]] = []
        prefills: list[PrefillRun] = []
        for start, stop, first, held in zip(
            runs.starts.tolist(), runs.stops.tolist(), runs.firsts.tolist(), self._held(runs), strict=True
        ):
            if stop - start == 1:
                decodes.append((start, held))
            else:
                prefills.append(PrefillRun(start, stop, first, self._tensor(held)))
        is_written = runs.slots >= 0
        rows = None if is_written.all() else self._tensor(np.flatnonzero(is_written))
        return TorchStep(self, self._tensor(runs.slots[is_written]), rows, self._decode_groups(decodes), prefills)

    def begin(self, plan: StepPlan) -> "tuple[StepInputs, TorchStep]":
        """See `PagedKV`."""
        inputs = map(self._tensor, (plan.token_ids, plan.runs.positions, plan.head_rows))
        return StepInputs(*inputs), self.step(plan.runs)

    def write(self, layer_idx: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value [num_slots, num_kv_heads, head_dim] at `slots` and return the layer's whole caches."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (self._allocate(key), self._allocate(value))
        keys, values = self._layers[layer_idx]
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)
        return keys, values

    def _tensor(self, slots: Ints) -> Tensor:
        return torch.from_numpy(slots).to(self._device, non_blocking=True)

    def _held(self, runs: Runs) -> Iterator[Ints]:
        """Of each sequence, the cache slots of its tokens up to its last row."""
        in_block = np.arange(self.block_size)
        for start, length in zip(runs.block_starts.tolist(), runs.lengths.tolist(), strict=True):
            blocks = runs.blocks[start : start - (-length // self.block_size)]
            yield (blocks[:, None] * self.block_size + in_block).ravel()[:length]

    def _decode_groups(self, decodes: Sequence[tuple[int, Ints]]) -> "list[DecodeGroup]":
        """Decoding rows by length, a doubling to a group, so that one long sequence does not pad all the others."""
        by_magnitude: dict[int, list[tuple[int, Ints]]] = {}
        for row, held in decodes:
            by_magnitude.setdefault(len(held).bit_length(), []).append((row, held))
        return [self._decode_group(members) for members in by_magnitude.values()]

    def _decode_group(self, members: Sequence[tuple[int, Ints]]) -> "DecodeGroup":
        lengths = np.array([len(held) for _, held in members])
        padded = np.zeros((len(members), lengths.max()), dtype=np.int64)
        for number, (_, held) in enumerate(members):
            padded[number, : len(held)] = held
        return DecodeGroup(
            rows=self._tensor(np.array([row for row, _ in members])),
            slots=torch.from_numpy(padded).to(self._device, non_blocking=True),
            lengths=self._tensor(lengths)[:, None],
        )

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
class _Attention:
    """One layer's attention, over groups of decoding rows and chunks of prompts."""

    layer: LayerAttention

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup) -> Tensor:
        """One row a sequence. The query heads that share a KV head lie along the query-length axis."""
        num_kv_heads = keys.shape[1]
        # heads [num_heads] become [num_kv_heads, heads_per_kv_head]
        grouped = query[group.rows].reshape(len(group.rows), num_kv_heads, -1, query.shape[-1])
        sinks = None if self.layer.sinks is None else self.layer.sinks.view(1, num_kv_heads, -1, 1)
        out = self._attend(
            grouped,
            keys[group.slots].transpose(1, 2),
            values[group.slots].transpose(1, 2),
            group.mask(self.layer.window),
            sinks,
        )
        return out.flatten(1, 2)

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, run: PrefillRun) -> Tensor:
        """One chunk of one prompt against everything before it and itself. → [num_queries, num_heads, head_dim]."""
        num_heads, heads_per_kv_head = query.shape[1], query.shape[1] // keys.shape[1]
        sinks = None if self.layer.sinks is None else self.layer.sinks.view(1, num_heads, 1, 1)
        out = self._attend(
            query[run.start : run.stop].transpose(0, 1).unsqueeze(0),
            keys[run.slots].repeat_interleave(heads_per_kv_head, dim=1).transpose(0, 1).unsqueeze(0),
            values[run.slots].repeat_interleave(heads_per_kv_head, dim=1).transpose(0, 1).unsqueeze(0),
            run.mask(self.layer.window),
            sinks,
        )
        return out[0].transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Softmax attention; `mask` None means causal from the first key on. Shapes as torch's SDPA."""
        if self.layer.softcap is None and sinks is None:
            return scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.layer.scaling
            )
        scores = (query @ key.transpose(-1, -2)).float() * self.layer.scaling
        if self.layer.softcap is not None:
            scores = torch.tanh(scores / self.layer.softcap) * self.layer.softcap
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is None:
            return scores.softmax(-1).to(value.dtype) @ value
        with_sinks = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
        return with_sinks.softmax(-1)[..., :-1].to(value.dtype) @ value


@dataclass(frozen=True, slots=True)
class TorchStep:
    """One step over `kv`."""

    kv: TorchKV
    slots: Tensor  # [num_written]: where keys and values are stored
    written: Tensor | None  # [num_written]: those of which rows; None: of all
    decodes: Sequence[DecodeGroup]
    prefills: Sequence[PrefillRun]

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `PagedStep`."""
        if self.written is not None:
            key, value = key[self.written], value[self.written]
        keys, values = self.kv.write(layer.layer_idx, self.slots, key, value)
        attention = _Attention(layer)
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        for group in self.decodes:
            out[group.rows] = attention.decode(query, keys, values, group)
        for run in self.prefills:
            out[run.start : run.stop] = attention.prefill(query, keys, values, run)
        return out
