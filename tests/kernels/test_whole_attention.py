"""Attention of whole inputs, packed, against plain softmax attention in float64: the torch and the cpu form."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repository import KERNEL_CACHE
from swaplora_server.kernels.backend import LayerAttention, WholeAttention
from swaplora_server.kernels.cpu import abi
from swaplora_server.kernels.cpu.whole_attention import CpuWhole
from swaplora_server.kernels.step import Runs
from swaplora_server.kernels.torch.whole_attention import TorchWhole

LIBRARY = abi.load_library(KERNEL_CACHE, lambda _message: None)
FORMS = ["torch", "cpu"]
LENGTHS = [1, 31, 2, 70, 33, 128]
TOLERANCE = 1e-5


def whole(form: str) -> WholeAttention:
    return TorchWhole() if form == "torch" else CpuWhole(LIBRARY)


def rows_of(lengths: list[int], *heads: int, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values [num_rows, num_heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(lengths), *heads, generator=generator) for _ in range(3)]


def attended(attention: WholeAttention, lengths: list[int], layer: LayerAttention, rows: list[Tensor]) -> Tensor:
    runs = Runs([0] * len(lengths), lengths, [[1]] * len(lengths), max(lengths))
    return attention.step(runs).attend(layer, *rows)


def plainly(lengths: list[int], layer: LayerAttention, rows: list[Tensor]) -> Tensor:
    """Each input by itself, in float64."""
    outs = []
    for query, key, value in zip(*(torch.split(part.double(), lengths) for part in rows), strict=True):
        positions = torch.arange(len(query))
        is_seen = (positions[:, None] - positions).abs() < (layer.window or len(query))
        scores = (torch.einsum("rhd,lhd->hrl", query, key) * layer.scaling).masked_fill(~is_seen, float("-inf"))
        outs.append(torch.einsum("hrl,lhd->rhd", scores.softmax(-1), value))
    return torch.cat(outs)


@pytest.mark.parametrize("heads", [(12, 32), (4, 8), (3, 64), (2, 33), (1, 128), (5, 20)])
@pytest.mark.parametrize("window", [None, 1, 5, 32, 65, 500])
@pytest.mark.parametrize("form", FORMS)
def test_every_row_attends_to_all_of_its_own_input(form: str, window: int | None, heads: tuple[int, int]) -> None:
    layer, rows = LayerAttention(0, heads[1] ** -0.5, window=window), rows_of(LENGTHS, *heads)
    off = (attended(whole(form), LENGTHS, layer, rows) - plainly(LENGTHS, layer, rows)).abs().max()
    assert off <= TOLERANCE


@pytest.mark.parametrize("fault", [{"window": 6}, {"window": 4}, {"window": None}, {"scaling": 0.36}])
@pytest.mark.parametrize("form", FORMS)
def test_a_fault_would_be_seen(form: str, fault: dict[str, Any]) -> None:
    rows = rows_of(LENGTHS, 4, 8)
    right = plainly(LENGTHS, LayerAttention(0, 8**-0.5, window=5), rows)
    wrong = LayerAttention(0, **({"scaling": 8**-0.5, "window": 5} | fault))
    assert (attended(whole(form), LENGTHS, wrong, rows) - right).abs().max() > 100 * TOLERANCE


@settings(max_examples=60)
@given(data=st.data())
def test_of_any_shape_a_cpu_row_is_right_and_the_same_bit_for_bit_alone_and_with_any_number_of_threads(
    data: st.DataObject,
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=6))
    heads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
    window = data.draw(st.none() | st.integers(1, 110))
    layer = LayerAttention(0, heads[1] ** -0.5, window=window)
    rows = rows_of(lengths, *heads, seed=data.draw(st.integers(0, 99)))
    attention, num_threads = whole("cpu"), torch.get_num_threads()
    together = attended(attention, lengths, layer, rows)
    assert (together - plainly(lengths, layer, rows)).abs().max() <= TOLERANCE
    torch.set_num_threads(data.draw(st.sampled_from([1, 3])))
    try:
        parts = zip(*(torch.split(part, lengths) for part in rows), strict=True)
        alone = [attended(attention, [length], layer, list(own)) for length, own in zip(lengths, parts, strict=True)]
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_leaves_nothing_to_the_next(form: str) -> None:
    """Also where the next is larger than all before it."""
    attention, layer = whole(form), LayerAttention(0, 0.3, window=9)
    attended(attention, [40, 3], layer, [torch.full((43, 2, 16), float("nan")) for _ in range(3)])
    for lengths in ([5], [30, 9], [64, 200, 17]):
        rows = rows_of(lengths, 2, 16)
        assert (attended(attention, lengths, layer, rows) - plainly(lengths, layer, rows)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_values_may_be_of_another_size_than_keys(form: str) -> None:
    layer, rows = LayerAttention(0, 0.3, window=9), rows_of(LENGTHS, 2, 16)
    rows[2] = rows[2][..., :6]
    assert (attended(whole(form), LENGTHS, layer, rows) - plainly(LENGTHS, layer, rows)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_layers_of_one_step_may_have_heads_of_any_number_and_size(form: str) -> None:
    """All of them are the first by number, as encoders have it."""
    runs = Runs([0] * len(LENGTHS), LENGTHS, [[1]] * len(LENGTHS), max(LENGTHS))
    step = whole(form).step(runs)
    for heads in ((2, 8), (12, 64), (3, 80), (2, 8)):
        layer, rows = LayerAttention(0, heads[1] ** -0.5), rows_of(LENGTHS, *heads)
        assert (step.attend(layer, *rows) - plainly(LENGTHS, layer, rows)).abs().max() <= TOLERANCE
