"""Linears that a model calls with the same tensor are multiplied at once where the backend joins: same answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

import tiny
from architectures import ARCHITECTURES
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.weights.load import load_weights
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.lora.joined import Joined
from swaplora_server.engine.lora.modules import LoraLinear
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams, Sequence
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.engine.step import Planner, use
from swaplora_server.kernels.backend import RunningStep, StepRows
from swaplora_server.kernels.step import Segments
from swaplora_server.kernels.torch.backend import TorchBackend

CPU = torch.device("cpu")
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
GROUPS: dict[str, list[set[str]]] = {
    "llama": [ATTENTION, MLP],
    "qwen2": [ATTENTION, MLP],  # with biases
    "cohere": [ATTENTION | MLP],  # which the layer computes side by side
    "mixtral": [ATTENTION],
    "phi3": [],
    "gpt2": [],
}


class Joining(TorchBackend):
    """Torch's operations, over linears that are multiplied at once."""

    joins = True


def load(folder: Path, backend: TorchBackend) -> BaseModel:
    return load_base(folder, device=CPU, dtype=torch.float32, backend=backend)


def save(folder: Path, kind: str) -> Path:
    return tiny.save_tiny_base(folder, {"model_type": kind, **ARCHITECTURES[kind]})


def groups_of(base: BaseModel) -> list[set[str]]:
    """By the names of their linears, of the first layer."""
    linears = [module for module in base.model.modules() if isinstance(module, LoraLinear) and module.joined]
    by_group: dict[int, set[str]] = {}
    for linear in linears:
        if ".0." in linear.path:
            by_group.setdefault(id(getattr(linear.joined, "__self__", None)), set()).add(linear.path.rpartition(".")[2])
    return list(by_group.values())


@pytest.mark.parametrize("kind", GROUPS)
def test_what_is_called_with_the_same_tensor_is_joined(kind: str, tmp_path: Path) -> None:
    """And passes the proof at start, adapters included."""
    with capture_logs() as logs:
        base = load(save(tmp_path, kind), Joining(CPU))
    assert groups_of(base) == GROUPS[kind]
    assert [entry for entry in logs if entry["log_level"] == "warning"] == []


def test_answers_are_those_of_linears_by_themselves(tmp_path: Path) -> None:
    """Of the base, adapters on all or some linears, one with a linear of its own, and a sum."""
    folder = save(tmp_path / "base", "qwen2")
    fields: list[dict[str, Any]] = [
        {"rank": 5, "use_dora": True},
        {"rank": 3, "target_modules": ["k_proj", "up_proj"]},
        {"rank": 4, "target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["v_proj"]},
    ]
    for number, own in enumerate(fields):
        tiny.save_adapter(tmp_path / str(number), folder, seed=number, **own)
    ours, expected = (
        logprobs(load(folder, backend), [tmp_path / str(number) for number in range(len(fields))])
        for backend in (Joining(CPU), TorchBackend(CPU))
    )
    assert (ours - expected).abs().max() < 1e-4
    assert (ours[1:] - ours[0]).abs().max() > 1e-2


def logprobs(base: BaseModel, adapters: list[Path]) -> Tensor:
    uses: list[tuple[AdapterUse, ...]] = [()]
    for folder in adapters:
        files = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        weights = base.prepared(load_weights(f"sha256:{folder.name}", *files, base.layers, base.dtype, CPU))
        uses.append((AdapterUse(weights, 1.0, weights.digest),))
    uses.append((*uses[1], *uses[2]))
    pool, rows = BlockPool(64, 16), []
    for adapters_of_row in uses:
        request = Request("row", (5, 6, 7), SamplingParams(1), lambda _event: None, adapters=adapters_of_row)
        sequence = Sequence(request, 0)
        pool.grow(sequence.block_table, sequence.num_tokens)
        rows.append(rows_of(sequence, 0, sequence.num_tokens))
    return base.runner(64, 16).logits(Batch(tuple(rows))).log_softmax(-1)


def test_weights_are_there_once(tmp_path: Path) -> None:
    """Each linear's is a view of its group's; what is counted and read of them is what it was."""
    folder = save(tmp_path, "qwen2")
    joined, apart = load(folder, Joining(CPU)), load(folder, TorchBackend(CPU))
    storages = {weight.untyped_storage().data_ptr(): weight for weight in joined.model.parameters()}
    num_apart = len(list(apart.model.parameters()))
    assert num_apart - len(storages) == 2 * (
        2 + 2 + 1
    )  # in each layer, of q, k, v and their biases, and of two linears
    num_bytes = sum(weight.untyped_storage().nbytes() for weight in storages.values())
    assert num_bytes == sum(weight.nbytes for weight in apart.model.parameters())
    assert joined.weight_bytes == apart.weight_bytes
    for path in apart.layers.linears:
        assert torch.equal(joined.layers.read(f"{path}.weight"), apart.layers.read(f"{path}.weight"))


def swapped(group: Joined) -> None:
    group._widths.reverse()  # noqa: SLF001 - widths of 32, 16, 16


def late(group: Joined) -> None:
    group._linears = group._linears[::-1]  # noqa: SLF001


@pytest.mark.parametrize("plant", [swapped, late])
def test_groups_that_compute_something_else_are_parted_again(
    plant: Callable[[Joined], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = Joined.__init__

    def planted(self: Joined, *arguments: Any) -> None:
        init(self, *arguments)
        plant(self)

    folder = save(tmp_path, "llama")
    monkeypatch.setattr(Joined, "__init__", planted)
    with capture_logs() as logs:
        base = load(folder, Joining(CPU))
    assert groups_of(base) == []
    assert base.layers.linears
    assert "one by one" in logs[-1]["event"]


def test_a_tensor_that_is_like_another_is_not_taken_for_it(tmp_path: Path) -> None:
    """Nor one of an earlier step: who is called again, multiplies again."""
    base = load(save(tmp_path, "llama"), Joining(CPU))
    q, k = (base.model.get_submodule(f"model.layers.0.self_attn.{name}_proj") for name in "qk")
    x, other = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    plan, nobody = Planner(16).plan([]), StepRows(Segments(), None)
    with use(RunningStep(plan, nobody, nobody, base.backend.paged_kv(1, 16).step(plan.runs))):
        for first, second in ((x, other), (x, x), (other, x.clone())):
            assert torch.allclose(q(first), first @ q.base.weight.t(), atol=1e-5)
            assert torch.allclose(k(second), second @ k.base.weight.t(), atol=1e-5)
        assert torch.allclose(q(x), x @ q.base.weight.t(), atol=1e-5)
