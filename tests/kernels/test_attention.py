"""Attention over pages against plain softmax attention over the same tokens: the torch and the cpu backend."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repository import KERNEL_CACHE
from swaplora_server.kernels.backend import LayerAttention, PagedKV
from swaplora_server.kernels.cpu import abi
from swaplora_server.kernels.cpu.attention import CpuKV
from swaplora_server.kernels.step import Runs
from swaplora_server.kernels.torch.attention import TorchKV

CPU = torch.device("cpu")
CACHE = KERNEL_CACHE
LIBRARY = abi.load_library(CACHE, lambda _message: None)
LENGTHS = [1, 2, 17, 64, 130]
FORMS = ["torch", "cpu", "cpu, bf16 cache"]
CPU_FORMS = FORMS[1:]
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
    return LayerAttention(0, head_dim**-0.5, fields.get("softcap"), sinks, fields.get("window"))


def attend_plainly(query: Tensor, keys: Tensor, values: Tensor, layer: LayerAttention, first: int = 0) -> Tensor:
    """In float64: query [num_rows, num_heads, head_dim] at `first` and on of keys, values [length, num_kv_heads, …]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (rows.double().repeat_interleave(group, 1) for rows in (keys, values))
    scores = torch.einsum("rhd,lhd->rhl", query.double(), keys) * layer.scaling
    if layer.softcap:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    behind = torch.arange(first, first + len(query))[:, None] - torch.arange(len(keys))
    is_seen = (behind >= 0) & (behind < (layer.window or len(keys)))
    scores = scores.masked_fill(~is_seen[:, None], float("-inf"))
    if layer.sinks is not None:
        scores = torch.cat([scores, layer.sinks.double()[None, :, None].expand(*scores.shape[:2], 1)], -1)
    return torch.einsum("rhl,lhd->rhd", scores.softmax(-1)[..., : len(keys)], values)


def cache_dtype(form: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in form else torch.float32


def make_kv(form: str, num_blocks: int, block_size: int) -> PagedKV:
    if form == "torch":
        return TorchKV(num_blocks, block_size, CPU)
    return CpuKV(LIBRARY, num_blocks, block_size, cache_dtype(form))


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Sequences:
    """Random queries, keys and values of whole sequences, and blocks for them in no order."""

    def __init__(self, lengths: list[int], heads: tuple[int, int, int], block_size: int, dtype: torch.dtype) -> None:
        num_heads, num_kv_heads, head_dim = heads
        total = sum(lengths)
        self.lengths = lengths
        self.query = torch.split(torch.randn(total, num_heads, head_dim).to(dtype), lengths)
        self.keys = torch.split(torch.randn(total, num_kv_heads, head_dim).to(dtype), lengths)
        self.values = torch.split(torch.randn(total, num_kv_heads, head_dim).to(dtype), lengths)
        self.num_blocks = sum(-(-length // block_size) for length in lengths) + 5
        free = random.Random(5).sample(range(1, self.num_blocks + 1), self.num_blocks)
        self.blocks = [[free.pop() for _ in range(-(-length // block_size))] for length in lengths]

    def run(self, kv: PagedKV, layer: LayerAttention, chunks: list[tuple[int, int, int]]) -> list[Tensor]:
        """One step of (sequence, first, stop), in that order; the output of each."""
        numbers, firsts, lengths = zip(*chunks, strict=True)
        runs = Runs(firsts, lengths, [self.blocks[number] for number in numbers], kv.block_size)
        query, keys, values = (
            torch.cat([rows[number][first:stop] for number, first, stop in chunks])
            for rows in (self.query, self.keys, self.values)
        )
        out = kv.step(runs).attend(layer, query, keys, values)
        return list(torch.split(out, (runs.stops - runs.starts).tolist()))

    def expected(self, chunk: tuple[int, int, int], layer: LayerAttention, form: str) -> Tensor:
        """Over keys and values as the form's cache holds them."""
        number, first, stop = chunk
        keys, values = (rows[number][:stop].to(cache_dtype(form)) for rows in (self.keys, self.values))
        return attend_plainly(self.query[number][first:stop], keys, values, layer, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads",
    [(4, 4, 8), (9, 3, 64), (8, 1, 128), (6, 2, 24), (4, 2, 20), (3, 1, 33), (7, 1, 16), (2, 1, 256), (4, 1, 80)],
)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_prompts_in_chunks_then_decoding_rows_attend_to_their_own_pages(
    form: str, name: str, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    layer = make_layer(name, heads[0], heads[2])
    sequences = Sequences(LENGTHS, heads, 16, dtype)
    kv = make_kv(form, sequences.num_blocks, 16)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    last = [(number, length - 1, length) for number, length in enumerate(LENGTHS)]
    steps = [
        [(number, 0, (length - 1) // 3) for number, length in enumerate(LENGTHS) if length > 3],
        [(number, (length - 1) // 3, length - 1) for number, length in enumerate(LENGTHS) if length > 3] + [(1, 0, 1)],
        last[::-1],
    ]
    for chunks in steps:
        for out, chunk in zip(sequences.run(kv, layer, chunks), chunks, strict=True):
            assert (out - sequences.expected(chunk, layer, form)).abs().max() <= tolerance


@pytest.mark.parametrize("block_size", [1, 3, 4, 8, 12, 16, 32])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_any_size_do(form: str, block_size: int) -> None:
    layer = make_layer("all", 6, 24)
    sequences = Sequences([50], (6, 2, 24), block_size, torch.float32)
    kv = make_kv(form, sequences.num_blocks, block_size)
    for chunk in [(0, 0, 21), (0, 21, 49), (0, 49, 50)]:
        (out,) = sequences.run(kv, layer, [chunk])
        assert (out - sequences.expected(chunk, layer, form)).abs().max() <= 1e-5


@pytest.mark.parametrize("block_size", [4, 12, 16, 32])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", CPU_FORMS)
def test_a_cpu_row_is_the_same_bit_for_bit_however_its_prompt_is_cut_and_whoever_is_beside_it(
    form: str, name: str, block_size: int
) -> None:
    layer = make_layer(name, 6, 24)
    sequences = Sequences([70, 33, 5], (6, 2, 24), block_size, torch.float32)
    alone = make_kv(form, sequences.num_blocks, block_size)
    (whole,) = sequences.run(alone, layer, [(0, 0, 70)])
    among = make_kv(form, sequences.num_blocks, block_size)
    first = sequences.run(among, layer, [(1, 0, 20), (0, 0, 1), (2, 0, 5)])[1]
    rest = [sequences.run(among, layer, [(1, at, at + 1), (0, at - 19, at + 3 - 19)])[1] for at in range(20, 33, 3)]
    tail = [sequences.run(among, layer, [(0, at, at + 1)])[0] for at in range(16, 20)]
    last = sequences.run(among, layer, [(0, 20, 70)])[0]
    assert torch.equal(torch.cat([first, *rest, *tail, last]), whole)


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("form", CPU_FORMS)
def test_of_any_shape_a_cpu_row_is_right_and_the_same_in_one_chunk_and_row_by_row(
    form: str, data: st.DataObject
) -> None:
    num_kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    heads = (num_kv_heads * group, num_kv_heads, data.draw(st.integers(1, 140)))
    block_size, length = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layer = make_layer(data.draw(st.sampled_from(sorted(LAYERS))), heads[0], heads[2])
    sequences = Sequences([length], heads, block_size, torch.float32)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, length), max_size=4)) - {length}), length]
    (whole,) = sequences.run(make_kv(form, sequences.num_blocks, block_size), layer, [(0, 0, length)])
    in_chunks = make_kv(form, sequences.num_blocks, block_size)
    chunks = [sequences.run(in_chunks, layer, [(0, *cut)])[0] for cut in pairwise(cuts)]
    assert torch.equal(torch.cat(chunks), whole)
    row_by_row = make_kv(form, sequences.num_blocks, block_size)
    rows = [sequences.run(row_by_row, layer, [(0, at, at + 1)])[0] for at in range(length)]
    assert torch.equal(torch.cat(rows), whole)
    assert (whole - sequences.expected((0, 0, length), layer, form)).abs().max() <= 1e-5


@pytest.mark.parametrize("form", CPU_FORMS)
def test_a_cpu_row_is_the_same_bit_for_bit_with_any_number_of_threads_and_in_any_blocks(form: str) -> None:
    layer = make_layer("all", 9, 64)
    outs = []
    for block_size in (1, 4, 16, 64):
        torch.manual_seed(3)
        sequences = Sequences(LENGTHS, (9, 3, 64), block_size, torch.float32)
        for num_threads in (1, 2, 3):
            kv = make_kv(form, sequences.num_blocks, block_size)
            with threads(num_threads):
                out = sequences.run(kv, layer, [(number, 0, length) for number, length in enumerate(LENGTHS)])
            outs.append(torch.cat(out))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(
    "value", [1.0, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3e38, 1e-40, float("inf"), float("nan")]
)
def test_a_bf16_cache_holds_what_is_nearest_ties_to_even(value: float) -> None:
    """One token's output is its value: that of rounding as torch does, in every lane and in what is left over."""
    rows = torch.full((1, 1, 75), value)
    kv = CpuKV(LIBRARY, 1, 4, torch.bfloat16)
    out = kv.step(Runs([0], [1], [[1]], 4)).attend(
        LayerAttention(0, 0.0), torch.zeros_like(rows), torch.zeros_like(rows), rows
    )
    assert torch.equal(out.nan_to_num(7.0), rows.bfloat16().float().nan_to_num(7.0))


@pytest.mark.parametrize("size", [1e-6, 0.01, 0.6, 0.7, 3.0, 40.0, 1e4])
def test_a_softcap_is_exact_for_scores_of_any_size(size: float) -> None:
    torch.manual_seed(1)
    layer = LayerAttention(0, size, softcap=5.0)
    sequences = Sequences([65], (2, 1, 16), 16, torch.float32)
    (out,) = sequences.run(make_kv("cpu", sequences.num_blocks, 16), layer, [(0, 0, 65)])
    assert (out - sequences.expected((0, 0, 65), layer, "cpu")).abs().max() <= 3e-5


@pytest.mark.parametrize("form", FORMS)
def test_what_a_freed_block_holds_cannot_reach_a_neighbour(form: str) -> None:
    layer, heads = make_layer("plain", 4, 16), (4, 2, 16)
    sequences = Sequences(LENGTHS, heads, 16, torch.float32)
    poison = Sequences([sequences.num_blocks * 16], heads, 16, torch.float32)
    poison.blocks = [list(range(1, sequences.num_blocks + 1))]
    poison.keys = poison.values = (torch.full_like(poison.keys[0], float("nan")),)
    kv = make_kv(form, sequences.num_blocks, 16)
    poison.run(kv, layer, [(0, 0, sequences.num_blocks * 16)])
    chunks = [(number, 0, max(1, length - 1)) for number, length in enumerate(LENGTHS)]
    last = [(number, length - 1, length) for number, length in enumerate(LENGTHS)]
    for out in [*sequences.run(kv, layer, chunks), *sequences.run(kv, layer, last)]:
        assert out.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_counted_by_token(form: str) -> None:
    sequences = Sequences([3], (4, 2, 8), 4, torch.float32)
    kv = make_kv(form, sequences.num_blocks, 4)
    sequences.run(kv, make_layer("plain", 4, 8), [(0, 0, 3)])
    assert kv.bytes_per_token == 2 * 2 * 8 * cache_dtype(form).itemsize


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("form", CPU_FORMS)
def test_keys_of_an_odd_head_are_counted_with_what_fills_them_up(form: str, block_size: int) -> None:
    sequences = Sequences([3], (3, 1, 33), block_size, torch.float32)
    kv = make_kv(form, sequences.num_blocks, block_size)
    sequences.run(kv, make_layer("plain", 3, 33), [(0, 0, 3)])
    assert kv.bytes_per_token == (34 + 33) * cache_dtype(form).itemsize


def test_a_layer_that_the_cpu_has_no_code_for_is_counted_as_torch_stores_it() -> None:
    kv = make_kv("cpu, bf16 cache", 2, 4)
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 6)
    out = kv.step(Runs([0], [3], [[1]], 4)).attend(make_layer("plain", 4, 8), query, key, value)
    expected = attend_plainly(query, key, value, make_layer("plain", 4, 8))
    assert (out - expected).abs().max() <= 1e-5
    assert kv.bytes_per_token == 2 * (8 + 6) * 4


def test_a_row_without_a_slot_writes_nothing() -> None:
    """As those do that fill a step up."""
    layer, sequences = make_layer("plain", 4, 16), Sequences([9], (4, 2, 16), 4, torch.float32)
    kv = make_kv("torch", sequences.num_blocks, 4)
    sequences.run(kv, layer, [(0, 0, 8)])
    query, key, value = (torch.randn(2, heads, 16) for heads in (4, 2, 2))
    stray = Runs([2, 5], [3, 6], [sequences.blocks[0]] * 2, 4, unwritten=[0, 1])
    kv.step(stray).attend(layer, query, key, value)
    (out,) = sequences.run(kv, layer, [(0, 8, 9)])
    torch.testing.assert_close(out.double(), sequences.expected((0, 8, 9), layer, "torch"), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="every row"):
        make_kv("cpu", sequences.num_blocks, 4).step(stray)


@pytest.mark.parametrize("form", FORMS)
def test_what_comes_after_a_rows_last_block_is_nobodys(form: str) -> None:
    """A table may hold more blocks than its tokens need, as before a prompt's next chunk."""
    layer, sequences = make_layer("plain", 4, 16), Sequences([6, 9], (4, 2, 16), 4, torch.float32)
    sequences.blocks[0].append(sequences.num_blocks)
    kv = make_kv(form, sequences.num_blocks, 4)
    for out, number in zip(sequences.run(kv, layer, [(0, 0, 6), (1, 0, 9)]), (0, 1), strict=True):
        length = sequences.lengths[number]
        assert (out - sequences.expected((number, 0, length), layer, form)).abs().max() <= 1e-5
