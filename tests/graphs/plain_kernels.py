"""The GPU's kernels as plain loops over the same arguments: what their docstrings say, on a CPU, in milliseconds.

They read counts, rows and addresses of adapters where the kernels do, from the words on the device. What the kernels
themselves compute is tried under Triton's interpreter, in tests/cuda.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import tape
from swaplora_server.kernels.cuda import attention_kernels, lora_kernels
from swaplora_server.kernels.cuda import rows as rows_kernels
from swaplora_server.kernels.cuda.adapter_tables import ADDS, WORDS
from swaplora_server.kernels.cuda.attention_runs import DECODE_WORDS, ITEM_WORDS, SEGMENT, TILE_WORDS
from swaplora_server.kernels.cuda.lora_shapes import SLICE
from swaplora_server.kernels.cuda.lora_tiles import COUNT_WORDS, ENTRY_WORDS
from swaplora_server.kernels.cuda.lora_tiles import TILE_WORDS as LORA_TILE_WORDS

Kernel = Callable[..., None]


class PlainKernel:
    """What is launched as `kernel[grid](…)`: recorded where a tape runs, and done at once."""

    def __init__(self, run: Kernel) -> None:
        self._run = run

    def __getitem__(self, grid: tuple[int, ...]) -> Kernel:
        def launch(*arguments: Any, **constants: Any) -> None:
            tape.launch(lambda: self._run(grid, *arguments, **constants))

        return launch


def put_in_place(patch: pytest.MonkeyPatch) -> None:
    """Have the GPU's kernels be these."""
    for module, kernels in ((lora_kernels, _LORA), (attention_kernels, _ATTENTION), (rows_kernels, _ROWS)):
        for kernel in kernels:
            patch.setattr(module, kernel.__name__, PlainKernel(kernel))


def _at(address: int, *shape: int, kind: Any = ctypes.c_float) -> NDArray[Any]:
    """What lies there."""
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((kind * count).from_address(address)).reshape(shape)


class _Module:
    """An adapter's factors for one module, float32."""

    def __init__(self, table: int, number: int) -> None:
        self.row = _at(table + number * WORDS * 8, WORDS, kind=ctypes.c_int64).tolist()
        self.rank, self.adds = self.row[4], bool(self.row[5] & ADDS)

    def of(self, word: int, *shape: int) -> Tensor:
        return torch.from_numpy(_at(self.row[word], *shape).copy())


def lora_shrink(
    _grid: Any, x: Tensor, plan: Tensor, first_entry: int, h: Tensor, h_elements: int, num_modules: int,
    _stride: int, in_features: int, *numbers: int, **_constants: Any,
) -> None:  # fmt: skip
    words = plan.tolist()
    planes = h.view(-1, num_modules, h_elements)
    for at in range(first_entry, first_entry + words[1] * ENTRY_WORDS, ENTRY_WORDS):
        table, offset, width, _, first_row, rows = words[at : at + ENTRY_WORDS]
        for place, number in enumerate(numbers[:num_modules]):
            module = _Module(table, number)
            if module.rank:
                lora_A = module.of(0, module.rank, in_features)
                for plane in range(len(planes)):
                    features = slice(plane * SLICE, (plane + 1) * SLICE)
                    to = planes[plane, place, offset : offset + rows * width].view(rows, width)
                    to[:, : module.rank] = x[first_row : first_row + rows, features] @ lora_A[:, features].t()


def lora_expand(_grid: Any, *arguments: Any, **_constants: Any) -> None:
    ys, (plan, first_entry, h, h_elements, num_modules, num_planes) = arguments[:4], arguments[4:10]
    widths, numbers = arguments[10:14], arguments[18:22]
    words = plan.tolist()
    sums = h.view(num_planes, num_modules, h_elements)
    for tile in range(COUNT_WORDS, COUNT_WORDS + words[0] * LORA_TILE_WORDS, LORA_TILE_WORDS):
        first_row, rows, first, count = words[tile : tile + LORA_TILE_WORDS]
        for place in range(num_modules):
            for entry in range(first, first + count):
                at = first_entry + entry * ENTRY_WORDS
                table, offset, width, scale = words[at : at + 4]
                module, factor = _Module(table, numbers[place]), float(np.int32(scale).view(np.float32))
                y = ys[place][first_row : first_row + rows]
                if module.adds and module.rank:
                    part = sums[:, place, offset : offset + rows * width].sum(0).view(rows, width)[:, : module.rank]
                    y += factor * part @ module.of(1, module.rank, widths[place])
                if module.row[2]:
                    y *= module.of(2, widths[place])
                if module.row[3]:
                    y += factor * module.of(3, widths[place])


def attention_write(
    grid: tuple[int, ...], key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *_: Any, **__: Any
) -> None:
    for row, slot in enumerate(slots[: grid[0]].tolist()):
        if slot >= 0:
            keys[slot], values[slot] = key[row], value[row]


def attention_prefill(
    grid: tuple[int, ...], query: Tensor, keys: Tensor, values: Tensor, out: Tensor, sinks: Tensor, blocks: Tensor,
    tiles: Tensor, _row: int, _head: int, *layer: Any, HAS_SINKS: bool, GROUP: int, QUERIES: int, BLOCK_SIZE: int,
    **_: Any,
) -> None:  # fmt: skip
    assert not HAS_SINKS
    for first_row, rows, first, table, flat in tiles.view(-1, TILE_WORDS)[: grid[0]].tolist():
        for token in range(flat // GROUP, min(rows, -(-(flat + QUERIES) // GROUP))):
            parts = [
                _segment(
                    query[first_row + token], keys, values, blocks[table:], first + token, number, layer, BLOCK_SIZE
                )
                for number in range((first + token) // SEGMENT + 1)
            ]
            out[first_row + token] = _folded(parts, layer[1])


def attention_decode(
    _grid: Any, query: Tensor, keys: Tensor, values: Tensor, sums: Tensor, largest: Tensor, totals: Tensor,
    blocks: Tensor, counts: Tensor, items: Tensor, _row: int, _head: int, *layer: Any, BLOCK_SIZE: int, **_: Any,
) -> None:  # fmt: skip
    for index, (row, at, table, segment) in enumerate(items.view(-1, ITEM_WORDS)[: int(counts[0])].tolist()):
        sums[index], largest[index], totals[index] = _segment(
            query[row], keys, values, blocks[table:], at, segment, layer, BLOCK_SIZE
        )


def attention_fold(
    grid: tuple[int, ...], sums: Tensor, largest: Tensor, totals: Tensor, out: Tensor, _sinks: Tensor,
    decodes: Tensor, _window: int, unit: float, *, HAS_SINKS: bool, **_: Any,
) -> None:  # fmt: skip
    assert not HAS_SINKS
    for row, at, first in decodes.view(-1, DECODE_WORDS)[: grid[0]].tolist():
        own = range(first, first + at // SEGMENT + 1) if at >= 0 else ()
        out[row] = _folded([(sums[item], largest[item], totals[item]) for item in own], unit)


def add_norm_kernel(
    grid: tuple[int, ...], hidden: Tensor, delta: Tensor, weight: Tensor, summed: Tensor, out: Tensor,
    first: int, eps: float, *, HAS_DELTA: bool, **_: Any,
) -> None:  # fmt: skip
    own = slice(first, first + grid[0])
    x = hidden[own] + delta[own] if HAS_DELTA else hidden[own]
    if HAS_DELTA:
        summed[own] = x
    out[own] = _normed(x, weight, eps)


def rope_store_kernel(
    grid: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
    query_weight: Tensor, key_weight: Tensor, slots: Tensor, out: Tensor, keys: Tensor, values: Tensor,
    first: int, eps: float, *, HAS_NORMS: bool, HEAD_DIM: int, **_: Any,
) -> None:  # fmt: skip
    def turned(x: Tensor, weight: Tensor, row: int) -> Tensor:
        heads = x[row].view(-1, HEAD_DIM)
        low, high = (_normed(heads, weight, eps) if HAS_NORMS else heads).chunk(2, -1)
        return torch.cat([low, high], -1) * cos[row] + torch.cat([-high, low], -1) * sin[row]

    for row in range(first, first + grid[0]):
        out[row] = turned(query, query_weight, row)
        if (slot := int(slots[row])) >= 0:
            keys[slot], values[slot] = turned(key, key_weight, row), value[row].view(-1, HEAD_DIM)


def silu_mul_kernel(_grid: Any, gate: Tensor, up: Tensor, out: Tensor, **_: Any) -> None:
    out.copy_(torch.nn.functional.silu(gate) * up)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


_LORA = (lora_shrink, lora_expand)
_ROWS = (add_norm_kernel, rope_store_kernel, silu_mul_kernel)
_ATTENTION = (attention_write, attention_prefill, attention_decode, attention_fold)
_Sums = tuple[Tensor, Tensor, Tensor]


def _segment(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, at: int, segment: int, layer: Any, block_size: int
) -> _Sums:
    """Σ p v, the largest score and Σ p of one row, [num_heads, …]."""
    window, unit, _, softcap = layer
    assert not softcap
    seen = torch.arange(max(segment * SEGMENT, at - window + 1), min(segment * SEGMENT + SEGMENT, at + 1))
    slots = blocks[seen // block_size] * block_size + seen % block_size
    group = query.shape[0] // keys.shape[1]
    k, v = (cache[slots].repeat_interleave(group, 1) for cache in (keys, values))
    scores = torch.einsum("hd,lhd->hl", query, k)
    largest = scores.amax(-1)
    p = torch.exp2((scores - largest[:, None]) * unit)
    return torch.einsum("hl,lhd->hd", p, v), largest, p.sum(-1)


def _folded(parts: list[_Sums], unit: float) -> Tensor:
    """0 where there is nothing."""
    if not parts:
        return torch.zeros(())
    most = torch.stack([largest for _, largest, _ in parts]).amax(0)
    shares = [torch.exp2((largest - most) * unit) for _, largest, _ in parts]
    total = sum(share * total for share, (_, _, total) in zip(shares, parts, strict=True))
    return sum(share[:, None] * o for share, (o, _, _) in zip(shares, parts, strict=True)) / total[:, None]  # type: ignore[index]
