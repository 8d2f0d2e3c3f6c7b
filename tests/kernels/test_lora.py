"""Every form of the LoRA operation against the reference, over ragged segments; base rows are left bit for bit."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_reference import ReferenceLora
from repository import KERNEL_CACHE
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.kernels.backend import Backend, LoraStep
from swaplora_server.kernels.pick import pick_backend, torch_backend
from swaplora_server.kernels.step import Segment, Segments

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
FORMS = {
    "torch": torch_backend(CPU),
    "cpu": pick_backend(CPU, torch.float32, KERNEL_CACHE, lambda _message: None),
    "cpu in bfloat16": pick_backend(CPU, torch.bfloat16, KERNEL_CACHE, lambda _message: None),
}
# of the rows, and of the factors
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
# by workload: one row each of many adapters, one adapter for all, a prompt beside decoding rows, overlapping sums
LAYOUTS = {
    "distinct": [(n, n + 1) for n in range(16)],
    "same": [(0, 16)],
    "prompt beside decodes": [(1, 2), (2, 60), (60, 61)],
    "sums": [(0, 5), (0, 5), (3, 9), (9, 10)],
    "odd": [(0, 1), (1, 4), (4, 9)],
}


PATHS = ["elsewhere", "here", "there"]


def adapter(rng: random.Random, in_features: int, out_features: int, dtype: torch.dtype) -> AdapterWeights:
    rank = rng.choice([0, 1, 3, 4, 7, 8, 16, 33, 64])
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    lora_A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
    lora_B = torch.randn(out_features, rank, generator=generator) / max(1, rank) ** 0.5
    lora_B = lora_B.t().contiguous().t()
    vectors = [torch.randn(out_features, generator=generator) if rng.random() < 0.3 else None for _ in range(2)]
    return AdapterWeights("sha256:0", {"here": ModuleWeights(lora_A.to(dtype), lora_B.to(dtype), *vectors)})


def step_of(form: Backend, segments: list[Segment]) -> LoraStep:
    prepared = [
        segment._replace(weights=replace(segment.weights, tables=form.tables(segment.weights, PATHS)))
        for segment in segments
    ]
    return form.lora(Segments(prepared))


def reference(segments: list[Segment]) -> LoraStep:
    return ReferenceLora(Segments(segments), PATHS)


def apply(step: LoraStep, y: Tensor, x: Tensor, number: int = 1) -> Tensor:
    out = y.clone()
    step.add(x, [(out, number)])
    return out


@pytest.mark.parametrize(("dtype", "stored"), DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(576, 192), (48, 576), (33, 31), (7, 1), (1, 100)])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_equals_the_reference(
    form: str, shape: tuple[int, int], layout: str, dtype: torch.dtype, stored: torch.dtype
) -> None:
    rng = random.Random(f"{form}{shape}{layout}")
    spans = LAYOUTS[layout]
    num_rows = max(stop for _, stop in spans) + 2
    segments = [Segment(adapter(rng, *shape, stored), rng.uniform(-2, 2), start, stop) for start, stop in spans]
    x, y = torch.randn(num_rows, shape[0]).to(dtype), torch.randn(num_rows, shape[1]).to(dtype)
    actual, expected = apply(step_of(FORMS[form], segments), y, x), apply(reference(segments), y, x)
    tolerance = max(TOLERANCE[dtype], 0.02 if FORMS[form].products else 0.0)
    assert (actual.float() - expected.float()).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
    assert torch.equal(actual[-2:], y[-2:]), "rows in no segment must not change"


@pytest.mark.parametrize("form", FORMS)
def test_a_module_that_an_adapter_does_not_target_is_left_bit_for_bit(form: str) -> None:
    lora = adapter(random.Random(1), 48, 32, torch.float32)
    x, y = torch.randn(4, 48), torch.randn(4, 32)
    assert torch.equal(apply(step_of(FORMS[form], [Segment(lora, 1.0, 0, 4)]), y, x, 0), y)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 16, 31, 32, 33])
@pytest.mark.parametrize(("dtype", "stored"), DTYPES)
@pytest.mark.parametrize("form", ["cpu", "cpu in bfloat16"])
def test_a_cpu_row_does_not_depend_on_its_neighbours(
    form: str, num_rows: int, dtype: torch.dtype, stored: torch.dtype
) -> None:
    rng = random.Random(1)
    lora = adapter(rng, 576, 192, stored)
    assert lora.rank
    x, y = torch.randn(40, 576).to(dtype), torch.randn(40, 192).to(dtype)
    together = apply(step_of(FORMS[form], [Segment(lora, 0.5, 0, num_rows)]), y[:num_rows], x[:num_rows])
    for row in range(num_rows):
        alone = apply(step_of(FORMS[form], [Segment(lora, 0.5, 0, 1)]), y[row : row + 1], x[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_a_form_that_forgets_the_scale_is_caught() -> None:
    lora = adapter(random.Random(3), 48, 32, torch.float32)
    x, y = torch.randn(4, 48), torch.randn(4, 32)
    right = apply(reference([Segment(lora, 0.5, 0, 4)]), y, x)
    wrong = apply(step_of(FORMS["torch"], [Segment(lora, 1.0, 0, 4)]), y, x)
    assert (right - wrong).abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "stored"), DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_modules_that_share_their_input_in_one_call_are_each_as_alone(
    form: str, dtype: torch.dtype, stored: torch.dtype
) -> None:
    rng = random.Random(7)
    here, there = adapter(rng, 48, 32, stored).modules["here"], adapter(rng, 48, 20, stored).modules["here"]
    both = AdapterWeights("sha256:0", {"here": here, "there": there})
    one = AdapterWeights("sha256:1", {"there": there})
    step = step_of(FORMS[form], [Segment(both, 0.5, 0, 3), Segment(one, 2.0, 3, 5)])
    x = torch.randn(6, 48).to(dtype)
    ys = [torch.randn(6, width).to(dtype) for width in (20, 32)]
    outs = [y.clone() for y in ys]
    step.add(x, [(outs[0], 2), (outs[1], 1)])
    for out, y, number in zip(outs, ys, (2, 1), strict=True):
        assert torch.equal(out, apply(step, y, x, number))
    assert not torch.equal(outs[0], ys[0])
    assert not torch.equal(outs[1], ys[1])


@pytest.mark.parametrize("form", FORMS)
def test_a_step_makes_no_tables_of_an_adapter(form: str) -> None:
    unprepared = adapter(random.Random(1), 48, 32, torch.float32)
    with pytest.raises(RuntimeError, match="not prepared"):
        FORMS[form].lora(Segments([Segment(unprepared, 1.0, 0, 4)]))
