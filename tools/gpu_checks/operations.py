"""The LoRA operation and paged attention on the card, against float64."""

import random
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_checks.card import Card
from gpu_checks.report import Report
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.kernels.backend import LayerAttention, PagedKV
from swaplora_server.kernels.cuda.attention_shapes import HeadSizeError, shape_of
from swaplora_server.kernels.step import Runs, Segment, Segments

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# ‖out - exact‖ / ‖exact‖, where the operands were of that dtype to begin with
TOLERANCE = {"fp32": 2e-6, "fp16": 2e-3, "bf16": 1.5e-2}
RANKS = (0, 1, 3, 8, 16, 33, 64, 128, 512)
SHAPES = ((576, 192), (48, 576), (33, 31), (4096, 14336), (14336, 4096))
PATHS = ("elsewhere", "here")
LAYOUTS = {
    "distinct": [(n, n + 1) for n in range(16)],
    "same": [(0, 16)],
    "prompt beside decodes": [(1, 2), (2, 260), (260, 261)],
    "sums": [(0, 5), (0, 5), (3, 9), (9, 10)],
}


def check_lora(report: Report, card: Card) -> dict[str, Any]:
    """Mixed ranks, sums, column scales and shifts; rows of nobody are left bit for bit."""
    worst: dict[str, float] = {}
    rng = random.Random(1)
    for name, dtype in DTYPES.items():
        for shape in SHAPES[: 3 if card.is_dry else None]:
            for layout, spans in LAYOUTS.items():
                error, is_left = _lora_error(card, rng, shape, spans, dtype)
                worst[name] = max(worst.get(name, 0.0), error)
                report.check(error <= TOLERANCE[name], f"LoRA {name} {shape} {layout}: off by {error:.1e}")
                report.check(is_left, f"LoRA {name} {shape} {layout}: a row of nobody was changed")
    for name, error in worst.items():
        report.row(f"LoRA operation against fp64, {name}", f"{error:.1e}")
    return {"worst": worst}


def _lora_error(
    card: Card, rng: random.Random, shape: tuple[int, int], spans: list[tuple[int, int]], dtype: torch.dtype
) -> tuple[float, bool]:
    num_in, num_out = shape
    num_rows = max(stop for _, stop in spans) + 2
    segments = [
        Segment(_adapter(card, rng, shape, dtype), rng.choice((-1.5, 0.5, 1.0)), start, stop) for start, stop in spans
    ]
    x = torch.randn(num_rows, num_in, device=card.device).to(dtype)
    y = torch.randn(num_rows, num_out, device=card.device).to(dtype)
    out, exact = y.clone(), y.double()
    card.backend(dtype).lora(Segments(segments)).add(x, [(out, 1)])
    for segment in segments:
        module, rows = segment.weights.modules["here"], slice(segment.start, segment.stop)
        exact[rows] += segment.scale * (x[rows].double() @ module.lora_A.double().t() @ module.lora_B.double().t())
        if module.column_scale is not None:
            exact[rows] *= module.column_scale.double()
        if module.shift is not None:
            exact[rows] += segment.scale * module.shift.double()
    return _error(out, exact), torch.equal(out[-2:], y[-2:])


def _adapter(card: Card, rng: random.Random, shape: tuple[int, int], dtype: torch.dtype) -> AdapterWeights:
    rank = rng.choice(RANKS)
    lora_A = torch.randn(rank, shape[0], device=card.device) / shape[0] ** 0.5
    lora_B = (torch.randn(rank, shape[1], device=card.device) / max(1, rank) ** 0.5).t()
    vectors = [torch.randn(shape[1], device=card.device) if rng.random() < 0.4 else None for _ in range(2)]
    weights = AdapterWeights("sha256:0", {"here": ModuleWeights(lora_A.to(dtype), lora_B.to(dtype), *vectors)})
    return replace(weights, tables=card.backend(dtype).tables(weights, PATHS))


def _error(out: Tensor, exact: Tensor) -> float:
    """NaN for what holds one, which no comparison lets pass."""
    return float((out.double() - exact).norm() / exact.norm())


class Heads(NamedTuple):
    """How many, how many of keys, and their size."""

    queries: int
    keys: int
    size: int


HEADS = (Heads(4, 4, 64), Heads(9, 3, 64), Heads(32, 8, 128), Heads(8, 1, 256), Heads(6, 2, 24))
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 40},
    "softcap": {"softcap": 3.0},
    "sinks": {"has_sinks": True},
    "all": {"window": 90, "softcap": 3.0, "has_sinks": True},
}
LENGTHS = (1, 2, 17, 64, 130, 700)
BLOCK = 16


def check_attention(report: Report, card: Card) -> dict[str, Any]:
    """Prompts in chunks, then decoding rows, over blocks that held NaN before."""
    worst: dict[str, float] = {}
    lengths = LENGTHS[: 5 if card.is_dry else None]
    for name, dtype in DTYPES.items():
        for heads in HEADS[1:2] if card.is_dry else heads_of(dtype):
            for kind in KINDS if heads == HEADS[1] else ("plain", "all"):  # each is compiled anew
                error = _attention_error(card, heads, kind, lengths, dtype)
                worst[name] = max(worst.get(name, 0.0), error)
                report.check(error <= TOLERANCE[name], f"attention {name} {heads} {kind}: off by {error:.1e}")
    for name, error in worst.items():
        report.row(f"paged attention against fp64, {name}", f"{error:.1e}")
    return {"worst": worst}


def heads_of(dtype: torch.dtype) -> list[Heads]:
    """Those that the kernels take: in float32 the largest are the torch form's."""
    found = []
    for heads in HEADS:
        with suppress(HeadSizeError):
            shape_of(str(dtype).removeprefix("torch."), heads.size, heads.size)
            found.append(heads)
    return found


def _attention_error(card: Card, heads: Heads, kind: str, lengths: tuple[int, ...], dtype: torch.dtype) -> float:
    fields = dict(KINDS[kind])
    sinks = torch.randn(heads.queries, device=card.device).to(dtype) if fields.pop("has_sinks", False) else None
    layer = LayerAttention(0, heads.size**-0.5, fields.get("softcap"), sinks, fields.get("window"))
    rows = [_rows(card, heads, length, dtype) for length in lengths]
    num_blocks = sum(-(-length // BLOCK) for length in lengths) + 3
    kv = card.backend(dtype).paged_kv(num_blocks, BLOCK)
    _poison(kv, num_blocks, rows[0])
    free = random.Random(5).sample(range(1, num_blocks + 1), num_blocks)
    blocks = [[free.pop() for _ in range(-(-length // BLOCK))] for length in lengths]
    worst = 0.0
    for chunks in _steps(lengths):
        numbers, firsts, stops = zip(*chunks, strict=True)
        runs = Runs(firsts, stops, [blocks[number] for number in numbers], BLOCK)
        given = [torch.cat([rows[number][part][first:stop] for number, first, stop in chunks]) for part in range(3)]
        out = kv.step(runs).attend(layer, *given)
        own = torch.split(out, (runs.stops - runs.starts).tolist())
        for rows_out, (number, first, stop) in zip(own, chunks, strict=True):
            exact = _attend_exactly(rows[number], first, stop, layer)
            error = _error(rows_out, exact)
            worst = error if not error <= worst else worst
    return worst


def _rows(card: Card, heads: Heads, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        torch.randn(length, number, heads.size, device=card.device).to(dtype)
        for number in (heads.queries, heads.keys, heads.keys)
    )
    return query, key, value


def _poison(kv: PagedKV, num_blocks: int, like: tuple[Tensor, Tensor, Tensor]) -> None:
    """Have every block but the first hold NaN, as those that some other sequence has left."""
    nan = [rows.new_full((num_blocks * BLOCK, *rows.shape[1:]), float("nan")) for rows in like]
    kv.step(Runs([0], [num_blocks * BLOCK], [range(1, num_blocks + 1)], BLOCK)).attend(LayerAttention(0, 1.0), *nan)


def _steps(lengths: tuple[int, ...]) -> list[list[tuple[int, int, int]]]:
    """(sequence, first, stop): a third of each prompt, then the rest but one, then one row of each."""
    long = [(number, length) for number, length in enumerate(lengths) if length > 3]
    return [
        [(number, 0, (length - 1) // 3) for number, length in long],
        [(number, (length - 1) // 3, length - 1) for number, length in long] + [(1, 0, 1)],
        [(number, length - 1, length) for number, length in enumerate(lengths)][::-1],
    ]


def _attend_exactly(rows: tuple[Tensor, Tensor, Tensor], first: int, stop: int, layer: LayerAttention) -> Tensor:
    """The definition, in float64: [stop - first, num_heads, head_dim]."""
    query = rows[0][first:stop].double()
    keys, values = (part[:stop].double().repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in rows[1:])
    scores = torch.einsum("qhd,khd->hqk", query, keys) * layer.scaling
    if layer.softcap:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    at = torch.arange(stop, device=query.device)
    visible = at <= at[first:, None]
    if layer.window:
        visible &= at > at[first:, None] - layer.window
    scores = scores.masked_fill(~visible, float("-inf"))
    if layer.sinks is not None:
        sinks = layer.sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sinks], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :stop], values)
