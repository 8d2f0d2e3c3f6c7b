"""Factors laid into panels hold what plain tensors would, value for value, and are refused for the same reasons."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from adapter_files import LAYERS, config_bytes, factors, write_adapter
from repository import KERNEL_CACHE
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.intake import inspect_files
from swaplora_adapters.weights import memory
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.memory import HugePages, mapping_bytes
from swaplora_adapters.weights.placement import as_built
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.base.base_model import load_base
from swaplora_server.kernels.cpu import abi, panels
from swaplora_server.kernels.cpu.backend import CpuBackend
from swaplora_server.kernels.pick import torch_backend
from swaplora_server.kernels.step import Segment, Segments

CPU = torch.device("cpu")
LIBRARY = abi.load_library(KERNEL_CACHE, lambda _message: None)
BACKEND, PLACEMENT = CpuBackend(LIBRARY, torch.float32), panels.placement(LIBRARY, torch.float32)
HALF = CpuBackend(LIBRARY, torch.bfloat16)
Tensors = dict[str, Tensor]
SPECIAL = [0.0, -0.0, 1e-45, 1e-40, 6e-8, 65504.0, 3e38, 3.3e38, float("inf"), float("nan")]


def same_bits(one: Tensor, other: Tensor) -> bool:
    kind = torch.int16 if one.dtype == torch.bfloat16 else torch.int32
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def random_factor(rng: random.Random, shape: tuple[int, int], dtype: torch.dtype, num_special: int) -> Tensor:
    factor = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    for _ in range(num_special if factor.numel() else 0):
        factor.view(-1)[rng.randrange(factor.numel())] = rng.choice(SPECIAL)
    return factor.to(dtype)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 70),
    st.integers(1, 300),
    st.integers(1, 120),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1.0, 2.0, 0.5, -1.0, 2.25, 1 / 3, 0.0, 1e30]),
    st.sampled_from([0, 0, 3]),
    st.randoms(use_true_random=False),
)
def test_panels_hold_what_plain_tensors_would(
    rank: int,
    in_features: int,
    out_features: int,
    stored: torch.dtype,
    served: torch.dtype,
    scaling: float,
    num_special: int,
    rng: random.Random,
) -> None:
    lora_A = random_factor(rng, (rank, in_features), stored, num_special)
    lora_B = random_factor(rng, (out_features, rank), stored, num_special)
    expected = as_built(lora_A, lora_B, scaling, served)
    found = panels.placement(LIBRARY, served)(HugePages(0))(lora_A, lora_B, scaling, torch.float32)
    assert (found.of_A, found.of_B) == (expected.of_A, expected.of_B)
    assert found.weights.rank == rank
    assert [t.nbytes for t in found.weights.tensors] == [t.nbytes for t in expected.weights.tensors]
    if found.of_A.is_finite and found.of_B.is_finite:
        assert same_bits(found.weights.lora_A, expected.weights.lora_A)
        assert same_bits(found.weights.lora_B, expected.weights.lora_B)


def test_numbers_along_the_sum_lie_side_by_side() -> None:
    factor = torch.arange(3 * 17.0).view(17, 3)
    laid = PLACEMENT(HugePages(0))(factor, torch.zeros(1, 17), 1.0, torch.float32).weights.tensors[0]
    assert laid[:16].tolist() == [3 * row for row in range(16)]  # k = 0 of the first panel
    assert laid[48:].tolist() == factor[16].tolist()  # the second panel is as narrow as what is left
    halves = PLACEMENT(HugePages(0))(factor.bfloat16(), torch.zeros(1, 17), 1.0, torch.float32).weights.tensors[0]
    assert halves[:4].tolist() == [0, 1, 3, 4]  # a word is k = 0 and 1 of a row
    assert halves[32:48].tolist() == [3 * row + 2 for row in range(16)]  # the last of an odd number, alone


def adapter(
    rng: random.Random,
    rank: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    backend: CpuBackend = BACKEND,
) -> AdapterWeights:
    lora_A = random_factor(rng, (rank, in_features), torch.float32, 0) / in_features**0.5
    lora_B = random_factor(rng, (out_features, rank), torch.float32, 0) / rank**0.5
    weights = AdapterWeights("sha256:0", {"here": ModuleWeights(lora_A.to(dtype), lora_B.to(dtype))})
    return replace(weights, tables=backend.tables(weights, ["here"]))


def added(y: Tensor, x: Tensor, *segments: Segment, backend: CpuBackend = BACKEND) -> Tensor:
    out = y.clone()
    backend.lora(Segments(segments)).add(x, [(out, 0)])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(384, 48), (385, 49), (769, 97), (1537, 200), (3, 1)])
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 17, 64, 512])
def test_a_delta_is_that_of_float64(rank: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rng = random.Random(rank)
    lora = adapter(rng, rank, *shape, dtype)
    x, y = random_factor(rng, (9, shape[0]), torch.float32, 0), random_factor(rng, (9, shape[1]), torch.float32, 0)
    module = lora.modules["here"]
    exact = y.double() - 0.75 * (x.double() @ module.lora_A.double().T @ module.lora_B.double().T)
    assert (added(y, x, Segment(lora, -0.75, 0, 9)).double() - exact).abs().max() < 5e-6


def few_integers(rng: random.Random, shape: tuple[int, int], share: float) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    values = torch.randint(-2, 3, shape, generator=generator)
    return (values * (torch.rand(shape, generator=generator) < share)).float()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 16, 17, 40])
@pytest.mark.parametrize("shape", [(384, 48), (576, 192), (385, 49), (769, 97), (66, 31), (3, 1)])
@pytest.mark.parametrize("rank", [0, 1, 8, 15, 16, 17, 32, 64, 70])
def test_products_of_bfloat16_are_exact_where_it_holds_all_that_is_summed(
    rank: int, shape: tuple[int, int], num_rows: int
) -> None:
    """Small integers: no sum passes 256, so x A^T is not rounded, and whatever is summed twice or not at all shows."""
    rng = random.Random(f"{rank}{shape}")
    lora_A, lora_B = (few_integers(rng, each, 0.2) for each in ((rank, shape[0]), (shape[1], rank)))
    x, y = few_integers(rng, (num_rows + 2, shape[0]), 0.2), few_integers(rng, (num_rows + 2, shape[1]), 1.0)
    assert rank == 0 or (x @ lora_A.T).abs().max() <= 256
    weights = AdapterWeights("sha256:0", {"here": ModuleWeights(lora_A, lora_B)})
    lora = replace(weights, tables=HALF.tables(weights, ["here"]))
    expected = y.clone()
    expected[1:-1] -= 2 * (x @ lora_A.T @ lora_B.T)[1:-1]
    assert torch.equal(added(y, x, Segment(lora, -2.0, 1, num_rows + 1), backend=HALF), expected)


@pytest.mark.parametrize("backend", [BACKEND, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_a_row_is_the_same_in_any_company_and_on_any_number_of_threads(
    rank: int, dtype: torch.dtype, backend: CpuBackend
) -> None:
    rng = random.Random(rank)
    own = adapter(rng, rank, 1537, 200, dtype, backend)
    others = [adapter(rng, 16, 1537, 200, dtype, backend) for _ in range(3)]
    x, y = random_factor(rng, (70, 1537), torch.float32, 0), random_factor(rng, (70, 200), torch.float32, 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [
            added(y[row : row + 1], x[row : row + 1], Segment(own, 0.5, 0, 1), backend=backend)[0] for row in range(70)
        ]
        for count, start, stop in itertools.product([1, 2, 3], [0, 1, 5], [6, 29, 70]):
            torch.set_num_threads(count)
            beside = [Segment(other, 1.0, at, at + 1) for at, other in zip(range(start), others, strict=False)]
            together = added(y, x, *beside, Segment(own, 0.5, start, stop), backend=backend)
            assert all(torch.equal(together[row], alone[row]) for row in range(start, stop))
    finally:
        torch.set_num_threads(threads)


def contents(weights: AdapterWeights) -> dict[str, list[Tensor | None]]:
    return {path: [m.lora_A, m.lora_B, m.column_scale, m.shift] for path, m in weights.modules.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"rank": 5}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_a_loaded_adapter_is_the_same_in_panels(tmp_path: Path, fields: dict[str, Any], dtype: torch.dtype) -> None:
    base = tiny.save_tiny_base(tmp_path / "base")
    folder = tiny.save_adapter(tmp_path / "a", base, seed=1, **fields)
    backend = torch_backend(CPU)
    layers = load_base(base, device=CPU, dtype=torch.float32, backend=backend).layers
    files = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    plain = load_weights("d", *files, layers, dtype, CPU)
    placed = load_weights("d", *files, layers, dtype, CPU, PLACEMENT)
    assert (placed.num_parameters, placed.nbytes, placed.rank) == (plain.num_parameters, plain.nbytes, plain.rank)
    assert contents(placed).keys() == contents(plain).keys()
    for found, expected in zip(contents(placed).values(), contents(plain).values(), strict=True):
        pairs = zip(found, expected, strict=True)
        assert all(one is other is None or same_bits(one, other) for one, other in pairs)  # type: ignore[arg-type]
    if "use_dora" in fields:  # its scales are float32 whatever the file has
        return
    spans = sorted((t.data_ptr(), t.nbytes) for module in placed.modules.values() for t in module.tensors)
    assert all(0 <= after - start - size < 64 for (start, size), (after, _) in itertools.pairwise(spans))


def with_value(value: float, part: str) -> Callable[[Tensors], Tensors]:
    def spoilt(tensors: Tensors) -> Tensors:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        for name, tensor in changed.items():
            if part in name:
                tensor[-1, -1] = value
        return changed

    return spoilt


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "q_proj.lora"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_refused_is_refused_with_the_same_words(
    tmp_path: Path, part: str, value: float, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in with_value(value, part)(factors()).items()}
    folder = write_adapter(tmp_path, tensors)
    files = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    outcomes = [refusal(partial(load_weights, "d", *files, LAYERS, dtype, CPU, given)) for given in (None, PLACEMENT)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] or (value == 3e38 and part == "lora_A")


def refusal(work: Callable[[], object]) -> tuple[str, ...]:
    """Why it was refused; nothing if it was not."""
    try:
        work()
    except InvalidAdapterError as error:
        return error.reasons
    return ()


@pytest.mark.parametrize("value", [0.5, float("nan"), 3e38, 3.4e38])  # the last is infinite in bfloat16
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_what_would_not_load_does_not_come_in(tmp_path: Path, products: torch.dtype, part: str, value: float) -> None:
    files = tmp_path / CONFIG_FILE, tmp_path / WEIGHTS_FILE
    files[0].write_bytes(config_bytes())
    safetensors.torch.save_file(with_value(value, part)(factors()), files[1])
    placement = panels.placement(LIBRARY, products)
    outcomes = [
        refusal(partial(load_weights, "d", *files, LAYERS, torch.float32, CPU, placement)),
        refusal(partial(inspect_files, *files, LAYERS, torch.float32, placement=placement)),
    ]
    assert outcomes[0] == outcomes[1]
    sound_in_A = [3e38] if products == torch.bfloat16 else [3e38, 3.4e38]  # B is multiplied by its scaling
    assert bool(outcomes[0]) is not (value == 0.5 or (part == "lora_A" and value in sound_in_A))


def test_a_survey_in_panels_is_that_of_plain_tensors(tmp_path: Path) -> None:
    files = tmp_path / CONFIG_FILE, tmp_path / WEIGHTS_FILE
    files[0].write_bytes(config_bytes())
    for tensors in (factors(), {name: torch.zeros_like(tensor) for name, tensor in factors().items()}):
        safetensors.torch.save_file(tensors, files[1])
        plain, in_panels = (inspect_files(*files, LAYERS, placement=given) for given in (None, PLACEMENT))
        assert in_panels == plain


def test_the_bytes_behind_the_last_tensor_of_a_mapping_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def mapping(size: int) -> mmap:
        sizes.append(size)
        return mmap(-1, size)

    monkeypatch.setattr(memory, "_mapping", mapping)
    pages = HugePages(mapping_bytes=mapping_bytes([100, 4000]))
    for num_bytes in (100, 4000):
        pages.empty(num_bytes // 4, torch.float32)
    assert sizes == [128 + 4032 + 64]
    pages.empty(1, torch.float32)
    HugePages(mapping_bytes=4096).empty(1024, torch.float32)
    assert sizes[1:] == [128 + 4032 + 64, 4096 + 64]
