"""Paged attention on a GPU: `CudaKV` has what `TorchKV` has, and its kernels read keys and values where they lie.

The equation and the order of its sums are in `attention_kernels.py`. Importing this needs triton: see `require_triton`.
"""

from dataclasses import dataclass, field
from math import log2

import numpy as np
import torch
from torch import Tensor

from swaplora_server.kernels.backend import LayerAttention, StepInputs
from swaplora_server.kernels.cuda import attention_kernels as kernels
from swaplora_server.kernels.cuda.attention_runs import Room, prefill_tiles, room_for, write
from swaplora_server.kernels.cuda.attention_shapes import AHEAD, PROGRAMS_PER_PROCESSOR, Shape, padded, shape_of
from swaplora_server.kernels.cuda.words import Words
from swaplora_server.kernels.step import Runs, StepPlan

_LOG2_E = log2(2.718281828459045)
_NO_WINDOW = 1 << 30


class CudaKV:
    """Keys and values of every layer [num_slots, num_kv_heads, head_dim]. A layer is allocated when it first writes.

    Blocks are not cleared: no kernel reads a key beyond a sequence's last or before a window.
    """

    def __init__(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.tile_shapes: dict[tuple[int, int], None] = {}  # of `prefill_tiles`, that layers have asked for so far
        self._num_slots = (num_blocks + 1) * block_size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Over all layers seen so far."""
        return sum(cache[0].numel() * cache.element_size() for layer in self._layers.values() for cache in layer)

    def step(self, runs: Runs) -> "CudaStep":
        """See `PagedKV`; in an array of the step's own size."""
        step = CudaStep(self, room_for(runs))
        step.hold(runs)
        return step

    def begin(self, plan: StepPlan) -> "tuple[StepInputs, CudaStep]":
        """See `PagedKV`; all that the device is told of it in one copy."""
        runs, room = plan.runs, room_for(plan.runs)
        tiles = [prefill_tiles(runs, *shape) for shape in self.tile_shapes]
        beside = [plan.token_ids, runs.positions, plan.head_rows, *(each.ravel() for each in tiles)]
        lengths = [len(each) for each in beside]
        words = Words.zeros(sum(lengths) + room.num_words, self.device)
        np.concatenate(beside, out=words.writable()[: sum(lengths)])
        step = CudaStep(self, room, words.part(sum(lengths), room.num_words))
        step.write(runs)
        words.send()
        token_ids, positions, head_rows, *sent = torch.split(words.on_device[: sum(lengths)], lengths)
        step.tiles |= {
            shape: flat.view(each.shape) for shape, flat, each in zip(self.tile_shapes, sent, tiles, strict=True)
        }
        return StepInputs(token_ids, positions, head_rows), step

    def layer(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's whole caches, for keys and values like these [num_rows, num_kv_heads, head_dim]."""
        if layer_idx not in self._layers:
            shapes = [(self._num_slots, *rows.shape[1:]) for rows in (key, value)]
            self._layers[layer_idx] = (key.new_empty(shapes[0]), value.new_empty(shapes[1]))
        return self._layers[layer_idx]


@dataclass(frozen=True, slots=True)
class _Launch:
    """What the kernels are told of one layer."""

    shape: Shape
    has_softcap: bool
    has_sinks: bool
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    block_size: int

    @property
    def parts(self) -> int:
        """Programs that share a row's value dims."""
        return -(-self.value_dim // self.shape.values)

    @property
    def constants(self) -> dict[str, int]:
        """Of both kernels that attend."""
        return {
            "HAS_SOFTCAP": self.has_softcap,
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "BLOCK_SIZE": self.block_size,
            "QUERIES": self.shape.queries,
            "KEYS": self.shape.keys,
            "DIMS": padded(self.head_dim),
            "VALUES": self.shape.values,
        }

    @property
    def options(self) -> dict[str, int]:
        """How both are compiled."""
        return {"num_warps": self.shape.num_warps, "num_stages": self.shape.num_stages}


@dataclass(slots=True)
class CudaStep:
    """One step over `kv`, of the runs that it was given last.

    Its array keeps its address, so that a graph which has captured `attend` of decoding rows serves those of `hold`.
    """

    kv: CudaKV
    room: Room
    words: Words | None = None  # `room.num_words`; its own unless given
    tiles: dict[tuple[int, int], Tensor] = field(init=False, default_factory=dict)  # of prompts, by `tile_shapes`
    _words: Words = field(init=False)
    _parts: tuple[Tensor, ...] = field(init=False)  # count of items, slots, decodes, items, blocks
    _runs: Runs = field(init=False)

    def __post_init__(self) -> None:
        self._words = self.words or Words.zeros(self.room.num_words, self.kv.device)
        self._parts = torch.split(self._words.on_device, list(self.room.part_words))

    def hold(self, runs: Runs) -> None:
        """These from now on. Raises CapacityError, and holds what it held then."""
        self.write(runs)
        self._words.send()

    def write(self, runs: Runs) -> None:
        """These, once its words are sent. Raises CapacityError, and writes nothing then."""
        write(runs, self._words.writable(), self.room)
        self._runs = runs
        self.tiles.clear()

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `PagedStep`. Raises ValueError for what the kernels have no code for."""
        self.store(layer, key, value)
        return self.read(layer, query, key, value)

    def store(self, layer: LayerAttention, key: Tensor, value: Tensor) -> None:
        """Store the rows' keys and values [num_rows, num_kv_heads, head_dim]."""
        key, value = _plain(key), _plain(value)
        keys, values = self.kv.layer(layer.layer_idx, key, value)
        num_rows, kv_heads, head_dim = key.shape
        if num_rows:
            kernels.attention_write[num_rows, kv_heads](
                key, value, keys, values, self._parts[1],
                *key.stride()[:2], *value.stride()[:2],
                KV_HEADS=kv_heads, HEAD_DIM=head_dim, VALUE_DIM=value.shape[2],
                DIMS=padded(max(head_dim, value.shape[2])), num_warps=1,
            )  # fmt: skip

    def read(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend to what is stored; key and value give shapes alone."""
        query = _plain(query)
        launch = self._launch(layer, query, key, value)
        keys, values = self.kv.layer(layer.layer_idx, key, value)
        if {query.dtype, keys.dtype, values.dtype} != {query.dtype}:
            raise ValueError(f"queries in {query.dtype} over keys in {keys.dtype} and values in {values.dtype}")
        out = query.new_empty(*query.shape[:2], launch.value_dim)
        sinks = out if layer.sinks is None else layer.sinks.float().contiguous()
        numbers = _numbers(layer)
        self._prefill(launch, numbers, query, keys, values, out, sinks)
        if self.room.decodes:
            self._decode(launch, numbers, query, keys, values, out, sinks)
        return out

    def _prefill(
        self,
        launch: _Launch,
        numbers: tuple[int, float, float, float],
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        sinks: Tensor,
    ) -> None:
        tiles = self._tiles_of(launch.group, launch.shape.queries)
        if len(tiles):
            kernels.attention_prefill[len(tiles), launch.kv_heads * launch.parts](
                query, keys, values, out, sinks, self._parts[4], tiles, *query.stride()[:2], *numbers,
                HAS_SINKS=launch.has_sinks, **launch.constants, **launch.options,
            )  # fmt: skip

    def _decode(
        self,
        launch: _Launch,
        numbers: tuple[int, float, float, float],
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        sinks: Tensor,
    ) -> None:
        count, _, decodes, items, blocks = self._parts
        heads = query.shape[1]
        sums = query.new_empty(self.room.items, heads, launch.value_dim, dtype=torch.float32)
        largest, totals = query.new_empty(2, self.room.items, heads, dtype=torch.float32)
        kernels.attention_decode[_num_programs(self.kv.device),](
            query, keys, values, sums, largest, totals, blocks, count, items, *query.stride()[:2], *numbers,
            **launch.constants, **launch.options,
        )  # fmt: skip
        kernels.attention_fold[self.room.decodes, heads](
            sums, largest, totals, out, sinks, decodes, *numbers[:2],
            HAS_SINKS=launch.has_sinks, HEADS=heads, VALUE_DIM=launch.value_dim,
            DIMS=padded(launch.value_dim), AHEAD=AHEAD, num_warps=1,
        )  # fmt: skip

    def _launch(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> _Launch:
        (_, heads, head_dim), kv_heads, value_dim = query.shape, key.shape[1], value.shape[2]
        shape = shape_of(str(query.dtype).removeprefix("torch."), head_dim, value_dim)
        return _Launch(
            shape,
            layer.softcap is not None,
            layer.sinks is not None,
            kv_heads,
            heads // kv_heads,
            head_dim,
            value_dim,
            self.kv.block_size,
        )

    @property
    def slots(self) -> Tensor:
        """[num_rows]: where the rows' keys and values are stored; -1: nowhere."""
        return self._parts[1]

    def _tiles_of(self, group: int, queries: int) -> Tensor:
        shape = (group, queries)
        if shape not in self.tiles:
            self.kv.tile_shapes[shape] = None
            tiles = torch.from_numpy(prefill_tiles(self._runs, *shape))
            # nothing is copied of nothing: a step that is recorded must not
            self.tiles[shape] = tiles.to(self.kv.device, non_blocking=True) if len(tiles) else tiles
        return self.tiles[shape]


def _numbers(layer: LayerAttention) -> tuple[int, float, float, float]:
    """window, unit, squash and softcap of the kernels."""
    if layer.scaling <= 0:
        raise ValueError(f"attention scores are scaled by {layer.scaling}, where only positive numbers are")
    window = _NO_WINDOW if layer.window is None else layer.window
    if layer.softcap is None:
        return window, layer.scaling * _LOG2_E, 0.0, 0.0
    return window, _LOG2_E, 2 * _LOG2_E * layer.scaling / layer.softcap, layer.softcap


def _plain(rows: Tensor) -> Tensor:
    """The numbers of a head lie side by side."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _num_programs(device: torch.device) -> int:
    """As many as run at once; under Triton's interpreter, which has no device, some."""
    if device.type != "cuda":
        return 3
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
