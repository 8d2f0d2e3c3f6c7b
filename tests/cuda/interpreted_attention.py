"""The GPU's attention against float64 and torch's form; a row is the same alone, in company, and however it is cut."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from swaplora_server.kernels.backend import LayerAttention
from swaplora_server.kernels.cuda.attention import CudaKV, CudaStep
from swaplora_server.kernels.cuda.attention_runs import Room
from swaplora_server.kernels.cuda.attention_shapes import HeadSizeError
from swaplora_server.kernels.cuda.lora_tiles import CapacityError
from swaplora_server.kernels.step import Runs
from swaplora_server.kernels.torch.attention import TorchKV

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "window over segments": {"window": 530},
    "softcap": {"softcap": 3.0},
    "sinks": {"has_sinks": True},
    "all": {"window": 70, "softcap": 3.0, "has_sinks": True},
}
# query heads, KV heads, head size, of values
HEADS = [(2, 2, 64, 64), (6, 2, 80, 80), (4, 1, 128, 128), (8, 1, 96, 40), (3, 1, 20, 20), (70, 1, 16, 16)]


def layer_of(name: str, num_heads: int, head_dim: int) -> LayerAttention:
    fields = dict(LAYERS[name])
    sinks = torch.randn(num_heads) if fields.pop("has_sinks", False) else None
    return LayerAttention(0, head_dim**-0.5, fields.get("softcap"), sinks, fields.get("window"))


def exactly(query: Tensor, keys: Tensor, values: Tensor, layer: LayerAttention, first: int) -> Tensor:
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


class Sequences:
    """Random queries, keys and values of whole sequences, and blocks for them in no order."""

    def __init__(
        self, lengths: list[int], heads: tuple[int, int, int, int], dtype: torch.dtype, block_size: int = 16
    ) -> None:
        num_heads, num_kv_heads, head_dim, value_dim = heads
        torch.manual_seed(sum(lengths) + num_heads)
        shapes = (num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, value_dim)
        self.rows = [[torch.randn(length, *shape).to(dtype) for length in lengths] for shape in shapes]
        needed = [-(-length // block_size) for length in lengths]
        self.num_blocks = sum(needed) + 5
        free = (1 + torch.randperm(self.num_blocks)).tolist()
        self.blocks = [[free.pop() for _ in range(count)] for count in needed]
        self.block_size = block_size

    def kv(self) -> CudaKV:
        """Every number of it is NaN at first."""
        kv = CudaKV(self.num_blocks, self.block_size, CPU)
        for cache in kv.layer(0, self.rows[1][0], self.rows[2][0]):
            cache.fill_(float("nan"))
        return kv

    def step(self, chunks: list[tuple[int, int, int]]) -> tuple[Runs, list[Tensor]]:
        """Of (sequence, first, stop), in that order, with heads before rows in memory, as models have them."""
        numbers, firsts, stops = zip(*chunks, strict=True)
        runs = Runs(firsts, stops, [self.blocks[number] for number in numbers], self.block_size)
        packed = [torch.cat([rows[number][first:stop] for number, first, stop in chunks]) for rows in self.rows]
        return runs, [rows.transpose(0, 1).contiguous().transpose(0, 1) for rows in packed]

    def run(self, kv: CudaKV | TorchKV, layer: LayerAttention, *chunks: tuple[int, int, int]) -> list[Tensor]:
        runs, rows = self.step(list(chunks))
        out = kv.step(runs).attend(layer, *rows)
        return list(torch.split(out, (runs.stops - runs.starts).tolist()))

    def exactly(self, layer: LayerAttention, chunk: tuple[int, int, int]) -> Tensor:
        number, first, stop = chunk
        query, key, value = (rows[number] for rows in self.rows)
        return exactly(query[first:stop], key[:stop], value[:stop], layer, first)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not filled in is NaN."""
    new_empty = Tensor.new_empty

    def poisoned(tensor: Tensor, *size: Any, **options: Any) -> Tensor:
        made = new_empty(tensor, *size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.mark.parametrize(
    ("heads", "name", "dtype"),
    [
        *((HEADS[1], name, torch.float32) for name in LAYERS),
        *((each, "all", torch.float16) for each in HEADS),
    ],
)
def test_prompts_and_decoding_rows_in_one_step_attend_to_their_own_pages(
    heads: tuple[int, int, int, int], name: str, dtype: torch.dtype
) -> None:
    layer = layer_of(name, heads[0], heads[2])
    sequences = Sequences([1, 17, 70], heads, dtype)
    kv, torch_kv = sequences.kv(), TorchKV(sequences.num_blocks, 16, CPU)
    for chunks in ([(1, 0, 16), (2, 0, 45)], [(2, 45, 70), (0, 0, 1), (1, 16, 17)]):
        outs, of_torch = (sequences.run(each, layer, *chunks) for each in (kv, torch_kv))
        for out, other, chunk in zip(outs, of_torch, chunks, strict=True):
            assert (out - sequences.exactly(layer, chunk)).abs().max() <= TOLERANCE[dtype]
            assert (out - other).abs().max() <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "dtype"), [("window over segments", torch.float16), ("all", torch.float32)])
def test_a_row_is_the_same_bit_for_bit_alone_in_company_in_a_prompt_and_decoding(name: str, dtype: torch.dtype) -> None:
    """Over more than two segments."""
    heads, length = (3, 1, 16, 16), 1060
    layer = layer_of(name, heads[0], heads[2])
    sequences = Sequences([length, 30], heads, dtype)
    kv = sequences.kv()
    (whole,) = sequences.run(kv, layer, (0, 0, length))
    assert (whole - sequences.exactly(layer, (0, 0, length))).abs().max() <= TOLERANCE[dtype]
    cuts = [0, 1, 531, 1023, length]
    kv = sequences.kv()
    chunks = [
        sequences.run(kv, layer, (1, 3 * number, 3 * number + 3), (0, *cut))[1]
        for number, cut in enumerate(pairwise(cuts))
    ]
    assert torch.equal(torch.cat(chunks), whole)
    for at in (0, 511, 512, 1024, length - 1):
        (alone,) = sequences.run(kv, layer, (0, at, at + 1))
        beside = sequences.run(kv, layer, (1, 0, 1), (0, at, at + 1), (1, 1, 9))[1]
        assert torch.equal(alone[0], whole[at])
        assert torch.equal(beside[0], whole[at])


@pytest.mark.parametrize("block_size", [1, 3, 32])
def test_blocks_of_any_size_do(block_size: int) -> None:
    layer, sequences = layer_of("all", 3, 20), Sequences([75], (3, 1, 20, 20), torch.float32, block_size)
    kv = sequences.kv()
    for chunk in [(0, 0, 40), (0, 40, 74), (0, 74, 75)]:
        (out,) = sequences.run(kv, layer, chunk)
        assert (out - sequences.exactly(layer, chunk)).abs().max() <= 1e-5


def test_a_row_without_a_slot_writes_nothing() -> None:
    layer, sequences = layer_of("plain", 2, 16), Sequences([9], (2, 1, 16, 16), torch.float32)
    kv = sequences.kv()
    sequences.run(kv, layer, (0, 0, 9))
    before = [cache.clone() for cache in kv.layer(0, sequences.rows[1][0], sequences.rows[2][0])]
    rows = [torch.ones(2, heads, 16) for heads in (2, 1, 1)]
    stray = Runs([2, 5], [3, 6], [sequences.blocks[0]] * 2, 16, unwritten=[0, 1])
    kv.step(stray).attend(layer, *rows)
    after = kv.layer(0, sequences.rows[1][0], sequences.rows[2][0])
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(after, before, strict=True))


def test_buffers_of_a_captured_step_serve_any_fewer_rows() -> None:
    """The rows that nobody has are zero, and write nothing."""
    layer, sequences = layer_of("sinks", 2, 16), Sequences([9, 600], (2, 1, 16, 16), torch.float32)
    kv = sequences.kv()
    sequences.run(kv, layer, (0, 0, 8), (1, 0, 599))
    step = CudaStep(kv, Room(slots=4, decodes=4, items=7, blocks=60))
    for chunks in ([(0, 8, 9), (1, 599, 600)], [(1, 599, 600)], [(0, 7, 8), (1, 598, 599), (0, 8, 9)]):
        runs, rows = sequences.step(chunks)
        step.hold(runs)
        padded = [torch.cat([each, torch.full((4 - len(each), *each.shape[1:]), 9.0)]) for each in rows]
        out = step.attend(layer, *padded)
        for number, chunk in enumerate(chunks):
            assert torch.equal(out[number : number + 1], sequences.run(kv, layer, chunk)[0])
        assert torch.equal(out[len(chunks) :], torch.zeros(4 - len(chunks), 2, 16))
    with pytest.raises(CapacityError, match="5 slots has room for 4"):
        step.hold(sequences.step([(0, 0, 5)])[0])


def test_what_the_kernels_have_no_code_for_is_refused_by_name() -> None:
    rows = [torch.ones(1, heads, 144) for heads in (2, 1, 1)]
    with pytest.raises(HeadSizeError, match="144 in float32 are larger than 128"):
        CudaKV(1, 16, CPU).step(Runs([0], [1], [[1]], 16)).attend(LayerAttention(0, 1.0), *rows)
    rows = [torch.ones(1, heads, 16) for heads in (2, 1, 1)]
    with pytest.raises(ValueError, match=r"scaled by 0\.0"):
        CudaKV(1, 16, CPU).step(Runs([0], [1], [[1]], 16)).attend(LayerAttention(0, 0.0), *rows)
    with pytest.raises(ValueError, match=r"queries in torch\.float16"):
        CudaKV(1, 16, CPU).step(Runs([0], [1], [[1]], 16)).attend(LayerAttention(0, 1.0), rows[0].half(), *rows[1:])


def test_bytes_are_counted_by_token() -> None:
    sequences = Sequences([3], (2, 1, 16, 8), torch.float16)
    kv = sequences.kv()
    sequences.run(kv, layer_of("plain", 2, 16), (0, 0, 3))
    assert kv.bytes_per_token == (16 + 8) * 2
