"""Mixtures in every form of the LoRA operation, against PEFT's own Arrow layer."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn

from repository import KERNEL_CACHE
from swaplora_adapters.weights.router import Prototypes, Route, Router, Shares
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.kernels.backend import Backend, LoraStep
from swaplora_server.kernels.pick import pick_backend, torch_backend
from swaplora_server.kernels.step import Segment, Segments
from swaplora_server.kernels.torch.lora import shares_of

CPU = torch.device("cpu")
FORMS = {
    "torch": torch_backend(CPU),
    "cpu": pick_backend(CPU, torch.float32, KERNEL_CACHE, lambda _message: None),
    "cpu in bfloat16": pick_backend(CPU, torch.bfloat16, KERNEL_CACHE, lambda _message: None),
}
TOLERANCE = {"torch": 2e-6, "cpu": 2e-6, "cpu in bfloat16": 2e-2}
PATHS = ["elsewhere", "here", "there"]
SHAPES = [(576, 192), (48, 576), (33, 31), (7, 5)]


class Watching:
    """A trace that keeps nothing but its key."""

    key = "watched"

    def begin(self, top_k: int) -> None:
        raise AssertionError

    def note(self, start: int, shares: Shares) -> None:
        raise NotImplementedError


def members(shape: tuple[int, int], count: int, seed: int, ranks: Sequence[int] = (4,)) -> list[AdapterWeights]:
    """Adapters of two modules that share their input."""
    generator = torch.Generator().manual_seed(seed)

    def module(rank: int, out_features: int) -> ModuleWeights:
        lora_A = torch.randn(rank, shape[0], generator=generator) / shape[0] ** 0.5
        return ModuleWeights(lora_A, torch.randn(out_features, rank, generator=generator) / rank**0.5)

    return [
        AdapterWeights(f"sha256:{seed}-{number}", {"here": module(rank, shape[1]), "there": module(rank, shape[1] + 1)})
        for number, rank in zip(range(count), [*ranks] * count, strict=False)
    ]


def router(adapters: Sequence[AdapterWeights], top_k: int, temperature: float) -> Router:
    return Router(tuple(Prototypes(weights, PATHS) for weights in adapters), top_k, temperature)


def mixture(adapters: Sequence[AdapterWeights], by: Router, start: int, stop: int) -> list[Segment]:
    return [Segment(weights, 1.0, start, stop, Route(by, number)) for number, weights in enumerate(adapters)]


def step_of(form: Backend, segments: Sequence[Segment]) -> LoraStep:
    return form.lora(
        Segments(
            [one._replace(weights=replace(one.weights, tables=form.tables(one.weights, PATHS))) for one in segments]
        )
    )


def added(form: str, segments: Sequence[Segment], x: Tensor, ys: Sequence[Tensor]) -> list[Tensor]:
    outs = [y.clone() for y in ys]
    step_of(FORMS[form], segments).add(x, [(out, number) for out, number in zip(outs, (1, 2), strict=True)])
    return outs


def peft_layer(
    in_features: int, names: Sequence[str], top_k: int = 1, temperature: float = 1.0
) -> ArrowLoraLinearLayer:
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = list(names), []
    return ArrowLoraLinearLayer(in_features, config)


def peft_delta(adapters: Sequence[AdapterWeights], path: str, x: Tensor, top_k: int, temperature: float) -> Tensor:
    """What PEFT's layer adds, which wants equal ranks: zeros fill up those of less."""
    names = [f"task_{number}" for number in range(len(adapters))]
    layer = peft_layer(x.shape[1], names, top_k, temperature)
    modules = [weights.modules[path] for weights in adapters]
    most = max(module.rank for module in modules)
    lora_A, lora_B = nn.ModuleDict(), nn.ModuleDict()
    for name, module in zip(names, modules, strict=True):
        lora_A[name] = nn.Linear(x.shape[1], most, bias=False)
        lora_B[name] = nn.Linear(most, module.lora_B.shape[0], bias=False)
        lora_A[name].weight = nn.Parameter(nn.functional.pad(module.lora_A, (0, 0, 0, most - module.rank)))
        lora_B[name].weight = nn.Parameter(nn.functional.pad(module.lora_B, (0, most - module.rank)))
    layer.build_prototypes(lora_A, lora_B)
    with torch.no_grad():
        delta: Tensor = layer(x[None], lora_A, lora_B, nn.Identity(), dict.fromkeys(names, 1.0))
    return delta[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_adds_what_pefts_layer_does(form: str, shape: tuple[int, int]) -> None:
    for count, top_k, temperature, ranks in [(2, 1, 1.0, (4,)), (3, 2, 0.1, (4, 17, 1)), (7, 7, 3.0, (16,))]:
        adapters = members(shape, count, count, ranks)
        x = torch.randn(45, shape[0], generator=torch.Generator().manual_seed(count))
        ys = [torch.randn(45, shape[1]), torch.randn(45, shape[1] + 1)]
        outs = added(form, mixture(adapters, router(adapters, top_k, temperature), 3, 43), x, ys)
        for path, y, out in zip(("here", "there"), ys, outs, strict=True):
            expected = peft_delta(adapters, path, x[3:43], top_k, temperature)
            assert (out[3:43] - y[3:43] - expected).abs().max() <= TOLERANCE[form] * max(1, float(expected.abs().max()))
            assert torch.equal(out[:3], y[:3])
            assert torch.equal(out[43:], y[43:])


@pytest.mark.parametrize("shape", SHAPES)
def test_prototypes_are_pefts(shape: tuple[int, int]) -> None:
    for weights in members(shape, 3, 11, (1, 4, 16)):
        mine = Prototypes(weights, PATHS)
        layer = peft_layer(shape[0], [])
        for number, path in ((1, "here"), (2, "there")):
            vector = mine.vectors[number]
            module = weights.modules[path]
            assert vector is not None
            theirs = layer.top_right_singular_vec_from_BA(module.lora_A, module.lora_B)
            assert (vector - theirs).abs().max() < 1e-5
        assert mine.vectors[0] is None


def test_an_adapter_that_adds_nothing_somewhere_is_like_nothing_there() -> None:
    shape = (48, 32)
    zero = AdapterWeights(
        "sha256:zero",
        {path: ModuleWeights(torch.randn(4, 48), torch.zeros(32 + more, 4)) for more, path in enumerate(PATHS[1:])},
    )
    adapters = [zero, *members(shape, 2, 1)]
    x = torch.randn(6, 48)
    shares = shares_of(x, router(adapters, 2, 1.0), 1)
    assert torch.equal(shares[:, 0], torch.zeros(6))
    outs = added("cpu", mixture(adapters, router(adapters, 2, 1.0), 0, 6), x, [torch.zeros(6, 32), torch.zeros(6, 33)])
    assert (outs[0] - peft_delta(adapters, "here", x, 2, 1.0)).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["cpu", "cpu in bfloat16"])
@pytest.mark.parametrize("shape", [(576, 192), (33, 31)])
def test_a_row_of_a_mixture_has_the_same_bits_in_any_company(form: str, shape: tuple[int, int]) -> None:
    adapters, others = members(shape, 4, 1, (8, 3, 16, 40)), members(shape, 3, 2)
    by, by_others = router(adapters, 2, 0.5), router(others, 1, 1.0)
    x = torch.randn(70, shape[0], generator=torch.Generator().manual_seed(1))
    ys = [torch.randn(70, shape[1] + more, generator=torch.Generator().manual_seed(2)) for more in (0, 1)]
    rng = random.Random(3)
    for start, stop in [(0, 70), (1, 2), (5, 40), (17, 64)]:
        beside = [Segment(others[0], rng.uniform(-1, 1), at, at + 1) for at in range(start)]
        behind = mixture(others, by_others, stop, 70) if stop < 70 else []
        together = added(form, [*beside, *mixture(adapters, by, start, stop), *behind], x, ys)
        for row in range(start, stop, 7):
            one = slice(row, row + 1)
            alone = added(form, mixture(adapters, by, 0, 1), x[one], [y[one] for y in ys])
            for own, company in zip(alone, together, strict=True):
                assert torch.equal(own[0], company[row])


@pytest.mark.parametrize("form", FORMS)
def test_shares_are_noted_where_they_are_traced_alone(form: str) -> None:
    adapters = members((48, 32), 3, 5)
    by = replace(router(adapters, 2, 0.3), trace=Watching())
    untraced = members((48, 32), 2, 6)
    x = torch.randn(20, 48, generator=torch.Generator().manual_seed(1))
    segments = [*mixture(untraced, router(untraced, 1, 1.0), 0, 4), *mixture(adapters, by, 4, 20)]
    step = step_of(FORMS[form], segments)
    step.add(x, [(torch.zeros(20, 32), 1)])
    noted = step.shares(Watching())
    assert noted is not None
    assert noted.shape == (3, 16, 3)
    assert np.isnan(noted[[0, 2]]).all(), "these two modules did not run"
    assert np.allclose(noted[1], shares_of(x[4:], by, 1).numpy(), atol=1e-6)
    assert np.allclose(noted[1].sum(1), 1)
    assert ((noted[1] > 0).sum(1) == 2).all()


def of_vectors(vectors: Tensor, top_k: int, temperature: float) -> Router:
    """Of members whose prototypes at one module are these, [num_members, in_features]."""
    made = []
    for vector in vectors:
        one = Prototypes(AdapterWeights("sha256:0", {}), PATHS)
        one.vectors = [None, vector, None]
        one.addresses = np.array([0, vector.data_ptr(), 0])
        made.append(one)
    return Router(tuple(made), top_k, temperature, Watching())


few = st.sampled_from([0.0, 1.0, -1.0, 2.0])  # so that members are often equally like


@given(st.data(), st.integers(2, 16), st.sampled_from([0.05, 1.0, 20.0]))
def test_shares_are_pefts_softmax_and_of_equals_the_first_is_taken(
    data: st.DataObject, count: int, temperature: float
) -> None:
    top_k = data.draw(st.integers(1, count))
    vectors = torch.tensor(data.draw(st.lists(st.tuples(few, few, few), min_size=count, max_size=count)))
    x = torch.tensor(data.draw(st.lists(st.tuples(few, few, few), min_size=1, max_size=4)))
    by = of_vectors(vectors, top_k, temperature)
    likeness = (x @ vectors.t()).abs()
    values = likeness.topk(top_k, dim=1).values
    rank = ModuleWeights(torch.randn(1, 3), torch.randn(2, 1))
    segments = mixture([AdapterWeights(f"sha256:{n}", {"here": rank}) for n in range(count)], by, 0, len(x))
    for form in ("torch", "cpu"):
        step = step_of(FORMS[form], segments)
        step.add(x, [(torch.zeros(len(x), 2), 1)])
        noted = step.shares(Watching())
        assert noted is not None
        for row, shares in enumerate(noted[1]):
            taken = np.flatnonzero(shares)
            order = sorted(range(count), key=lambda member: -float(likeness[row, member]))[:top_k]
            assert set(taken) <= set(order)  # sorted() keeps the order of equals; the least of shares may vanish
            expected = (values[row] / temperature).softmax(0)
            assert np.allclose([shares[member] for member in order], expected.numpy(), atol=1e-6)


def test_a_form_that_forgets_the_sign_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = members((48, 32), 4, 9)
    x = torch.randn(30, 48, generator=torch.Generator().manual_seed(4))
    segments, ys = mixture(adapters, router(adapters, 1, 1.0), 0, 30), [torch.zeros(30, 32), torch.zeros(30, 33)]
    right = added("torch", segments, x, ys)[0]
    monkeypatch.setattr(Tensor, "abs", lambda tensor: tensor)
    wrong = added("torch", segments, x, ys)[0]
    monkeypatch.undo()
    assert (right - wrong).abs().max() > 0.1
