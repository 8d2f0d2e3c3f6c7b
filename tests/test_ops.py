"""Every form of the LoRA operation against the reference, over ragged segments; base rows are left bit for bit."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swaplora_adapters.apply.activation import LoraOp, ModuleSegment
from swaplora_adapters.apply.ops import native, reference, torch_form

CACHE = Path(__file__).parent.parent / ".cache" / "native"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
FORMS = {"torch": torch_form.OP, "native": native.load(CACHE, lambda _message: None)}
# by workload: one row each of many adapters, one adapter for all, a prompt beside decoding rows, overlapping sums
LAYOUTS = {
    "distinct": [(n, n + 1) for n in range(16)],
    "same": [(0, 16)],
    "prompt beside decodes": [(1, 2), (2, 60), (60, 61)],
    "sums": [(0, 5), (0, 5), (3, 9), (9, 10)],
    "odd": [(0, 1), (1, 4), (4, 9)],
}


def factors(rng: random.Random, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rank = rng.choice([1, 3, 4, 7, 8, 16, 33, 64])
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    lora_A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
    lora_B = torch.randn(out_features, rank, generator=generator) / rank**0.5
    return lora_A.to(dtype), lora_B.to(dtype)


def apply(op: LoraOp, y: Tensor, x: Tensor, segments: list[ModuleSegment]) -> Tensor:
    out = y.clone()
    op.add(out, x, op.prepare(segments))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(576, 192), (48, 576), (33, 31), (7, 1), (1, 100)])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_equals_the_reference(form: str, shape: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    rng = random.Random(f"{form}{shape}{layout}")
    spans = LAYOUTS[layout]
    num_rows = max(stop for _, stop in spans) + 2
    segments = [ModuleSegment(*factors(rng, *shape, dtype), rng.uniform(-2, 2), start, stop) for start, stop in spans]
    x, y = torch.randn(num_rows, shape[0]).to(dtype), torch.randn(num_rows, shape[1]).to(dtype)
    actual, expected = apply(FORMS[form], y, x, segments), apply(reference.OP, y, x, segments)
    assert (actual.float() - expected.float()).abs().max() <= TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    assert torch.equal(actual[-2:], y[-2:]), "rows in no segment must not change"


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 16, 31, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_native_row_does_not_depend_on_its_neighbours(num_rows: int, dtype: torch.dtype) -> None:
    rng = random.Random(3)
    lora = factors(rng, 576, 192, dtype)
    x, y = torch.randn(40, 576).to(dtype), torch.randn(40, 192).to(dtype)
    together = apply(FORMS["native"], y[:num_rows], x[:num_rows], [ModuleSegment(*lora, 0.5, 0, num_rows)])
    for row in range(num_rows):
        alone = apply(FORMS["native"], y[row : row + 1], x[row : row + 1], [ModuleSegment(*lora, 0.5, 0, 1)])
        assert torch.equal(alone[0], together[row])


def test_a_form_that_forgets_the_scale_is_caught() -> None:
    lora = factors(random.Random(1), 48, 32, torch.float32)
    x, y = torch.randn(4, 48), torch.randn(4, 32)
    right = apply(reference.OP, y, x, [ModuleSegment(*lora, 0.5, 0, 4)])
    wrong = apply(torch_form.OP, y, x, [ModuleSegment(*lora, 1.0, 0, 4)])
    assert (right - wrong).abs().max() > 0.1
