"""Attention over pages against plain softmax attention over the same tokens: torch's form and the native kernel."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swaplora_server.engine import native_attention
from swaplora_server.engine.attention import DecodeGroup, LayerAttention, PagedKV, PagedStep, PrefillRun, use

CACHE = Path(__file__).parent.parent / ".cache" / "native"
NUM_SLOTS = 400
LENGTHS = [1, 2, 17, 64, 130]
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "window beyond": {"window": 500},
    "softcap": {"softcap": 3.0},
    "sinks": {"has_sinks": True},
    "all": {"window": 9, "softcap": 3.0, "has_sinks": True},
}


def make_layer(name: str, num_heads: int, head_dim: int) -> LayerAttention:
    fields = dict(LAYERS[name])
    sinks = torch.randn(num_heads) if fields.pop("has_sinks", False) else None
    return LayerAttention(head_dim**-0.5, fields.get("softcap"), sinks, fields.get("window"))


def attend_plainly(query: Tensor, keys: Tensor, values: Tensor, layer: LayerAttention) -> Tensor:
    """The definition: query [num_heads, head_dim] at the last of keys, values [length, num_kv_heads, head_dim]."""
    length, heads_per_kv_head = len(keys), query.shape[0] // keys.shape[1]
    keys, values = (t.float().repeat_interleave(heads_per_kv_head, 1) for t in (keys, values))
    scores = torch.einsum("hd,lhd->hl", query.float(), keys) * layer.scaling
    if layer.softcap:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    if layer.window:
        scores[:, : max(0, length - layer.window)] = float("-inf")
    if layer.sinks is not None:
        scores = torch.cat([scores, layer.sinks[:, None]], 1)
    return torch.einsum("hl,lhd->hd", scores.softmax(-1)[:, :length], values)


def pages(dtype: torch.dtype, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    rng = random.Random(5)
    keys, values = (torch.randn(NUM_SLOTS, num_kv_heads, head_dim).to(dtype) for _ in range(2))
    slots = [torch.tensor(rng.sample(range(1, NUM_SLOTS), length)) for length in LENGTHS]
    return keys, values, slots


def group_of(slots: list[Tensor], rows: list[int]) -> DecodeGroup:
    padded = torch.zeros(len(slots), max(map(len, slots)), dtype=torch.int64)
    for number, held in enumerate(slots):
        padded[number, : len(held)] = held
    return DecodeGroup(torch.tensor(rows), padded, torch.tensor([[len(held)] for held in slots]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4, 8), (9, 3, 64), (8, 1, 128), (6, 2, 24), (4, 2, 20)])
@pytest.mark.parametrize("name", LAYERS)
def test_decoding_rows_attend_to_their_own_pages(name: str, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = heads
    layer = make_layer(name, num_heads, head_dim)
    keys, values, slots = pages(dtype, num_kv_heads, head_dim)
    query = torch.randn(8, num_heads, head_dim).to(dtype)
    rows = [6, 0, 3, 5, 1]
    group = group_of(slots, rows)
    expected = torch.stack(
        [attend_plainly(query[row], keys[held], values[held], layer) for row, held in zip(rows, slots, strict=True)]
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    by_torch = layer.decode(query, keys, values, group)
    assert (by_torch.float() - expected).abs().max() <= tolerance
    out = torch.full_like(query, 7.0)
    kernel = native_attention.load(CACHE, lambda _message: None)
    assert kernel(query, keys, values, group, layer, out) == (head_dim % 8 == 0)
    if head_dim % 8 == 0:
        assert (out[rows].float() - expected).abs().max() <= tolerance
        assert (out[[2, 4, 7]] == 7.0).all(), "rows that do not decode must not be written"


@pytest.mark.parametrize("first", [0, 11])
@pytest.mark.parametrize("name", LAYERS)
def test_a_chunk_of_a_prompt_looks_back_and_never_ahead(name: str, first: int) -> None:
    layer = make_layer(name, 6, 16)
    keys, values, _ = pages(torch.float32, 2, 16)
    slots = torch.randperm(NUM_SLOTS)[: first + 9]
    query = torch.randn(12, 6, 16)
    out = layer.prefill(query, keys, values, PrefillRun(2, 11, first, slots))
    for row in range(9):
        seen = slots[: first + row + 1]
        expected = attend_plainly(query[2 + row], keys[seen], values[seen], layer)
        assert (out[row] - expected).abs().max() <= 1e-5


def test_what_a_freed_block_holds_cannot_reach_a_neighbour() -> None:
    keys, values, slots = pages(torch.float32, 2, 16)
    layer, query = make_layer("plain", 4, 16), torch.randn(8, 4, 16)
    group = group_of(slots, list(range(5)))
    before = layer.decode(query, keys, values, group)
    unused = sorted(set(range(1, NUM_SLOTS)) - set(torch.cat(slots).tolist()))
    keys[unused], values[unused] = float("nan"), float("nan")
    keys[0], values[0] = 0.0, 0.0  # the block that padding points at
    assert torch.equal(layer.decode(query, keys, values, group), before)


def test_the_first_block_is_zero_whatever_memory_held() -> None:
    kv = PagedKV(3, 4)
    keys, values = kv.write(0, torch.tensor([5]), torch.ones(1, 2, 8), torch.ones(1, 2, 8))
    assert not keys[:4].any()
    assert not values[:4].any()
    assert kv.bytes_per_token == 2 * 2 * 8 * 4


def test_steps_do_not_nest() -> None:
    step = PagedStep(PagedKV(1, 1), torch.tensor([1]), (), (), None)
    with use(step), pytest.raises(RuntimeError, match="already"), use(step):
        pass
    with use(step):
        pass
