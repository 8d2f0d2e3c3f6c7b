"""The GPU's LoRA kernels against float64 and torch's form; rows of nobody are left bit for bit."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from repository import KERNEL_CACHE
from swaplora_adapters.weights.router import Prototypes, Route, Router
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.kernels.cuda.adapter_tables import AdapterTables
from swaplora_server.kernels.cuda.lora import CudaLora
from swaplora_server.kernels.cuda.lora_tiles import Capacity, CapacityError
from swaplora_server.kernels.pick import pick_backend
from swaplora_server.kernels.step import Segment, Segments
from swaplora_server.kernels.torch.lora import ModulesByNumber, TorchLora

CPU = torch.device("cpu")
PATHS = ("nowhere", "q", "k", "v", "gate", "up")
NUMBERS = {path: number for number, path in enumerate(PATHS)}
# |out - exact| / max(1, largest |exact|): float16 is rounded once, from float32
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
# of the rows, and of the factors
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16)]
# decoding rows, rows of one adapter beyond a tile, a prompt beside decoding rows, sums that overlap in part
LAYOUTS = {
    "distinct": [(n, n + 1) for n in range(4)],
    "same": [(1, 18)],
    "prompt beside decodes": [(0, 1), (1, 34), (34, 35)],
    "sums": [(0, 5), (0, 5), (3, 20), (20, 21)],
}


def adapter(
    seed: int, rank: int, modules: dict[str, tuple[int, int]], dtype: torch.dtype, **vectors: bool
) -> AdapterWeights:
    """Of modules by path: (in_features, out_features)."""
    random_of = torch.Generator().manual_seed(seed)

    def module(num_in: int, num_out: int) -> ModuleWeights:
        lora_A = torch.randn(rank, num_in, generator=random_of) / num_in**0.5
        lora_B = torch.randn(rank, num_out, generator=random_of) / max(1, rank) ** 0.5
        own = {name: torch.randn(num_out, generator=random_of) for name, has_it in vectors.items() if has_it}
        return ModuleWeights(lora_A.to(dtype), lora_B.to(dtype).t(), **own)

    return AdapterWeights(f"sha256:{seed}", {path: module(*shape) for path, shape in modules.items()})


def prepared(weights: AdapterWeights, dtype: torch.dtype) -> AdapterWeights:
    return replace(weights, tables=AdapterTables(weights, PATHS, dtype, CPU))


def added(segments: Sequence[Segment], x: Tensor, ys: dict[str, Tensor]) -> list[Tensor]:
    """What the kernels make of modules' outputs."""
    ours = Segments([segment._replace(weights=prepared(segment.weights, x.dtype)) for segment in segments])
    outs = [y.clone() for y in ys.values()]
    CudaLora.of(ours, x.dtype, CPU).add(x, [(out, NUMBERS[path]) for out, path in zip(outs, ys, strict=True)])
    return outs


def exactly(segments: Sequence[Segment], x: Tensor, y: Tensor, path: str) -> Tensor:
    exact = y.double()
    for weights, scale, start, stop, _ in segments:
        if (module := weights.modules.get(path)) is not None:
            delta = x[start:stop].double() @ module.lora_A.double().t() @ module.lora_B.double().t()
            out = exact[start:stop] + scale * delta
            out = out if module.column_scale is None else out * module.column_scale.double()
            exact[start:stop] = out if module.shift is None else out + scale * module.shift.double()
    return exact


def worst(out: Tensor, exact: Tensor) -> float:
    """NaN for what holds one, which no comparison lets pass."""
    return float((out.double() - exact).abs().max() / max(1.0, float(exact.abs().max())))


@pytest.mark.parametrize(("dtype", "stored"), DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 48), (33, 31), (7, 1)])
def test_ragged_segments_of_many_ranks_are_as_in_float64(
    shape: tuple[int, int], layout: str, dtype: torch.dtype, stored: torch.dtype
) -> None:
    rng = random.Random(f"{shape}{layout}{stored}")
    spans = LAYOUTS[layout]
    ranks = rng.sample((0, 1, 3, 8, 16, 17, 33, 64), len(spans))
    adapters = [
        adapter(number, rank, {"q": shape}, stored, column_scale=rng.random() < 0.4, shift=rng.random() < 0.4)
        for number, rank in enumerate(ranks)
    ]
    segments = [Segment(one, rng.uniform(-2, 2), *span) for one, span in zip(adapters, spans, strict=True)]
    x, y = (torch.randn(spans[-1][1] + 2, features).to(dtype) for features in shape)
    (out,) = added(segments, x, {"q": y})
    assert worst(out, exactly(segments, x, y, "q")) <= TOLERANCE[dtype]
    assert torch.equal(out[-2:], y[-2:])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernels_are_as_torchs_form(dtype: torch.dtype) -> None:
    weights = adapter(1, 16, {"q": (64, 64)}, dtype, column_scale=True, shift=True)
    x, y = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype)
    (out,) = added([Segment(weights, 0.5, 1, 4)], x, {"q": y})
    definition = y.clone()
    defined = Segments([Segment(replace(weights, tables=ModulesByNumber(weights, PATHS)), 0.5, 1, 4)])
    TorchLora(defined).add(x, [(definition, NUMBERS["q"])])
    assert worst(out, definition.double()) <= 5 * TOLERANCE[dtype]  # torch rounds after each operation
    assert not torch.equal(out[1:4], y[1:4])


def test_features_beyond_one_plane_are_summed() -> None:
    shape = (2 * 1024 + 48, 16)
    weights = adapter(1, 5, {"q": shape}, torch.float32)
    segments = [Segment(weights, 1.0, 0, 3)]
    x, y = torch.randn(3, shape[0]), torch.zeros(3, shape[1])
    (out,) = added(segments, x, {"q": y})
    assert worst(out, exactly(segments, x, y, "q")) <= TOLERANCE[torch.float32]


def test_what_half_precision_cannot_hold_of_h_is_not_lost() -> None:
    """h = (1 + 2^-12, 1): float16 has no such first number, and the difference is all that there is."""
    x, lora_A = torch.zeros(1, 16).half(), torch.zeros(2, 16).half()
    x[0, :2] = torch.tensor([1, 2**-12])
    lora_A[0, :2], lora_A[1, 0] = 1, 1
    lora_B = torch.tensor([[1.0] * 16, [-1.0] * 16]).half().t()
    weights = AdapterWeights("sha256:0", {"q": ModuleWeights(lora_A, lora_B)})
    (out,) = added([Segment(weights, 1.0, 0, 1)], x, {"q": torch.zeros(1, 16).half()})
    assert torch.equal(out, torch.full_like(out, 2**-12))


def test_rows_of_nobody_may_hold_anything() -> None:
    """NaN in them does not reach the rows beside them, and is not written over."""
    weights = adapter(1, 8, {"q": (32, 32)}, torch.float32)
    segments = [Segment(weights, 1.0, 1, 3), Segment(weights, 1.0, 4, 5)]
    x, y = torch.randn(6, 32), torch.randn(6, 32)
    base = [0, 3, 5]
    x[base] = y[base] = float("nan")
    (out,) = added(segments, x, {"q": y})
    assert out[base].isnan().all()
    assert worst(out[1:3], exactly(segments, x, y, "q")[1:3]) <= TOLERANCE[torch.float32]
    assert worst(out[4:5], exactly(segments, x, y, "q")[4:5]) <= TOLERANCE[torch.float32]


def test_columns_beside_an_output_are_left() -> None:
    """Outputs that lie beside each other, as where one product makes all of them."""
    modules = {"q": (32, 24), "k": (32, 16)}
    segments = [Segment(adapter(1, 8, modules, torch.float32), 1.0, 0, 2)]
    x, joined = torch.randn(2, 32), torch.full((2, 48), float("nan"))
    q, k = joined[:, :24], joined[:, 24:40]
    ys = {"q": torch.randn(2, 24), "k": torch.randn(2, 16)}
    q.copy_(ys["q"])
    k.copy_(ys["k"])
    ours = Segments([segment._replace(weights=prepared(segment.weights, x.dtype)) for segment in segments])
    CudaLora.of(ours, x.dtype, CPU).add(x, [(q, NUMBERS["q"]), (k, NUMBERS["k"])])
    assert [torch.equal(*pair) for pair in zip((q, k), added(segments, x, ys), strict=True)] == [True, True]
    assert joined[:, 40:].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_modules_that_share_their_input_are_each_as_alone(dtype: torch.dtype) -> None:
    """Five of them, more than a launch takes, of several widths; adapters target some of them each."""
    shapes = {"q": (48, 64), "k": (48, 17), "v": (48, 32), "gate": (48, 130), "up": (48, 1)}
    some = {path: shapes[path] for path in ("k", "up", "gate")}
    segments = [
        Segment(adapter(1, 9, shapes, dtype, shift=True), 0.5, 0, 3),
        Segment(adapter(2, 33, some, dtype, column_scale=True), -1.0, 2, 4),
    ]
    x = torch.randn(5, 48).to(dtype)
    ys = {path: torch.randn(5, width).to(dtype) for path, (_, width) in shapes.items()}
    for path, out in zip(ys, added(segments, x, ys), strict=True):
        assert torch.equal(out, added(segments, x, {path: ys[path]})[0])
        assert worst(out, exactly(segments, x, ys[path], path)) <= TOLERANCE[dtype]


def test_what_no_adapter_targets_is_left_bit_for_bit() -> None:
    weights = adapter(1, 8, {"q": (32, 32)}, torch.float32)
    x, y = torch.randn(4, 32), torch.full((4, 32), -0.0)
    (out,) = added([Segment(weights, 1.0, 0, 4)], x, {"nowhere": y})
    assert out.signbit().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    """Alone, in a tile of its kind, and in a step of others of larger ranks, it has the same bits."""
    shape = (80, 64)
    ours = adapter(1, 19, {"q": shape}, dtype, column_scale=True)
    others = [adapter(seed, rank, {"q": shape}, dtype, shift=True) for seed, rank in enumerate((64, 3), 2)]
    x, y = torch.randn(40, 80).to(dtype), torch.randn(40, 64).to(dtype)
    together = [
        Segment(others[0], 1.0, 0, 7),
        Segment(ours, 0.5, 7, 30),
        Segment(others[1], -1.0, 9, 12),
        Segment(others[0], 2.0, 30, 40),
    ]
    (out,) = added(together, x, {"q": y})
    for row in (7, 8, 12, 27, 28, 29):
        (alone,) = added([Segment(ours, 0.5, 0, 1)], x[row : row + 1], {"q": y[row : row + 1]})
        assert torch.equal(alone[0], out[row])
    both = [Segment(ours, 0.5, 0, 1), Segment(others[1], -1.0, 0, 1)]
    (alone,) = added(both, x[10:11], {"q": y[10:11]})
    assert torch.equal(alone[0], out[10])


def test_buffers_serve_one_step_after_the_other() -> None:
    shape = (32, 16)
    one, two = (adapter(seed, rank, {"q": shape}, torch.float32) for seed, rank in ((1, 40), (2, 3)))
    steps = [
        [Segment(one, 1.0, 0, 20)],
        [],
        [Segment(two, 0.5, 3, 4), Segment(one, 2.0, 5, 6)],
    ]
    lora = CudaLora(Capacity(tiles=4, entries=4, h_elements=2048), torch.float32, CPU)
    x, y = torch.randn(20, 32), torch.randn(20, 16)
    for segments in steps:
        out = y.clone()
        lora.hold(Segments([each._replace(weights=prepared(each.weights, x.dtype)) for each in segments]))
        lora.add(x, [(out, NUMBERS["q"])])
        assert torch.equal(out, added(segments, x, {"q": y})[0] if segments else y)
    many = [Segment(prepared(two, x.dtype), 1.0, row, row + 1) for row in range(5)]
    with pytest.raises(CapacityError, match="5 LoRA tiles has room for 4"):
        lora.hold(Segments(many))
    again = y.clone()
    lora.add(x, [(again, NUMBERS["q"])])
    assert torch.equal(again, out), "what it held before it still holds"


def test_what_was_not_prepared_is_refused() -> None:
    weights = adapter(1, 8, {"q": (32, 32)}, torch.float32)
    for unprepared in (weights, prepared(weights, torch.float16)):
        with pytest.raises(RuntimeError, match="not prepared"):
            CudaLora.of(Segments([Segment(unprepared, 1.0, 0, 1)]), torch.float32, CPU)


@pytest.mark.parametrize("bad", ["x", "y", "dtype"])
def test_rows_that_the_kernels_cannot_read_are_refused(bad: str) -> None:
    weights = prepared(adapter(1, 8, {"q": (32, 32)}, torch.float32), torch.float32)
    lora = CudaLora.of(Segments([Segment(weights, 1.0, 0, 2)]), torch.float32, CPU)
    x, y = torch.randn(32, 32), torch.randn(32, 32)
    x, y = (x.t() if bad == "x" else x), (y.t() if bad == "y" else y.half() if bad == "dtype" else y)
    with pytest.raises(ValueError, match="plain"):
        lora.add(x, [(y, NUMBERS["q"])])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mixtures_beside_others_are_as_on_a_cpu(dtype: torch.dtype) -> None:
    """Three members of unequal ranks, two at a time, beside an adapter and rows of the base, at two modules."""
    modules = {"q": (48, 40), "k": (48, 24)}
    members = [adapter(seed, rank, modules, torch.float32) for seed, rank in enumerate((4, 7, 16))]
    router = Router(tuple(Prototypes(weights, PATHS) for weights in members), 2, 0.7)
    mixed = [Segment(weights, 1.0, 3, 21, Route(router, number)) for number, weights in enumerate(members)]
    beside = [Segment(adapter(9, 8, modules, torch.float32), 0.5, *span) for span in ((1, 3), (22, 24))]
    segments = [beside[0], *mixed, beside[1]]
    random_of = torch.Generator().manual_seed(5)
    x, q, k = (torch.randn(25, features, generator=random_of).to(dtype) for features in (48, 40, 24))
    outs = added(segments, x, {"q": q, "k": k})
    cpu = pick_backend(CPU, torch.float32, KERNEL_CACHE, lambda _message: None)
    of_cpu = [replace(one.weights, tables=cpu.tables(one.weights, PATHS)) for one in segments]
    expected = [rows.float().clone() for rows in (q, k)]
    own = Segments([one._replace(weights=weights) for one, weights in zip(segments, of_cpu, strict=True)])
    cpu.lora(own).add(x.float(), list(zip(expected, (NUMBERS["q"], NUMBERS["k"]), strict=True)))
    for out, right, before in zip(outs, expected, (q, k), strict=True):
        assert worst(out, right.double()) <= (1e-4 if dtype == torch.float32 else 1e-2)
        assert torch.equal(out[[0, 21, 24]], before[[0, 21, 24]])
        assert float((right[3:21] - before[3:21].float()).abs().max()) > 0.1


def test_a_mixture_alone_launches_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaLora, "_add", lambda *_: pytest.fail("nothing of a plain adapter is in this step"))
    members = [adapter(seed, 4, {"q": (48, 40)}, torch.float32) for seed in range(2)]
    router = Router(tuple(Prototypes(weights, PATHS) for weights in members), 1, 1.0)
    mixed = [Segment(weights, 1.0, 0, 3, Route(router, number)) for number, weights in enumerate(members)]
    assert added(mixed, torch.ones(3, 48), {"q": torch.zeros(3, 40)})[0].abs().max() > 0
