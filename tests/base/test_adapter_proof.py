"""The proof with adapters: a kernel that is wrong in what only adapters use refuses the base, or is not put in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from architectures import ARCHITECTURES
from repository import KERNEL_CACHE
from swaplora_adapters.weights.served import AdapterWeights, LinearWeights, ModuleWeights
from swaplora_server.base import base_model
from swaplora_server.base.adapter_proof import AdapterProof, adapter_proof
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.engine.lora import modules
from swaplora_server.engine.request import Request, SamplingParams, Sequence
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels.backend import Backend, StepRows
from swaplora_server.kernels.cpu import decoder
from swaplora_server.kernels.cpu.attention import CpuKV
from swaplora_server.kernels.cpu.backend import CpuBackend
from swaplora_server.kernels.cpu.decoder import CpuDecoder
from swaplora_server.kernels.cpu.lora import CpuLora
from swaplora_server.kernels.pick import pick_backend, torch_backend
from swaplora_server.kernels.step import Segments
from swaplora_server.kernels.torch.attention import DecodeGroup
from swaplora_server.kernels.torch.lora import ModulesByNumber

CPU = torch.device("cpu")
CPU_BACKEND = pick_backend(CPU, torch.float32, KERNEL_CACHE, lambda _message: None)
Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_tiny_base(tmp_path, {"model_type": "qwen3", **ARCHITECTURES["qwen3"]})


def load(folder: Path, backend: Backend = CPU_BACKEND) -> BaseModel:
    return load_base(folder, device=CPU, dtype=torch.float32, backend=backend)


def changed(**fields: Callable[[LinearWeights], Any]) -> Plant:
    """The torch form reads other factors than the adapter's."""

    def altered(own: LinearWeights | None) -> LinearWeights | None:
        if own is None:
            return None
        parts: dict[str, Any] = {"column_scale": own.column_scale, "shift": own.shift, "lora_A": own.lora_A}
        parts |= {name: change(own) for name, change in fields.items()}
        return ModuleWeights(lora_B=own.lora_B, **parts)

    def plant(patch: pytest.MonkeyPatch) -> None:
        tables = ModulesByNumber.__init__

        def wrong(self: ModulesByNumber, weights: AdapterWeights, paths: Any) -> None:
            tables(self, weights, paths)
            self.modules = list(map(altered, self.modules))

        patch.setattr(ModulesByNumber, "__init__", wrong)

    return plant


def without_scales(patch: pytest.MonkeyPatch) -> None:
    lora = CpuBackend.lora

    def wrong(self: CpuBackend, segments: Segments) -> CpuLora:
        return lora(self, Segments([segment._replace(scale=1.0) for segment in segments]))

    patch.setattr(CpuBackend, "lora", wrong)


def one_row_early(patch: pytest.MonkeyPatch) -> None:
    """An adapter applies to the row before its first one too."""
    lora = CpuBackend.lora

    def wrong(self: CpuBackend, segments: Segments) -> CpuLora:
        return lora(self, Segments([segment._replace(start=max(0, segment.start - 1)) for segment in segments]))

    patch.setattr(CpuBackend, "lora", wrong)


def no_own_modules(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modules, "replaced_rows", lambda _segments, _path: ())


def no_own_rows_of_the_embedding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modules.LoraEmbedding, "_change", lambda *_arguments: None)


FAULTS: dict[str, tuple[Backend, Plant]] = {
    "scales": (CPU_BACKEND, without_scales),
    "rows": (CPU_BACKEND, one_row_early),
    "own modules": (CPU_BACKEND, no_own_modules),
    "own rows": (CPU_BACKEND, no_own_rows_of_the_embedding),
    "column scales": (torch_backend(CPU), changed(column_scale=lambda _own: None)),
    "shifts": (torch_backend(CPU), changed(shift=lambda _own: None)),
    "factors": (torch_backend(CPU), changed(lora_A=lambda own: own.lora_A * 1.3)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_base_on_which_adapters_come_to_something_else_is_refused(
    fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, plant = FAULTS[fault]
    assert load(folder, backend).layers.linears
    plant(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="something else with adapters"):
        load(folder, backend)


def own_modules_left_out(patch: pytest.MonkeyPatch) -> None:
    replaced = decoder.replaced_of
    patch.setattr(decoder, "replaced_of", lambda _segments: replaced(Segments()))


def no_deltas(patch: pytest.MonkeyPatch) -> None:
    rows = decoder.rows_of
    patch.setattr(decoder, "rows_of", lambda count, own, replaced: rows(count, StepRows(own.segments, None), replaced))


def numbers_of_neighbours(patch: pytest.MonkeyPatch) -> None:
    entry = decoder._entry  # noqa: SLF001

    def wrong(layer: Any) -> Any:
        made = entry(layer)
        made.numbers[1], made.numbers[2] = made.numbers[2], made.numbers[1]  # of keys and values, which are as wide
        return made

    patch.setattr(decoder, "_entry", wrong)


@pytest.mark.parametrize("plant", [own_modules_left_out, no_deltas, numbers_of_neighbours])
def test_fused_layers_that_are_wrong_with_adapters_alone_are_not_put_in(
    plant: Plant, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [type(layer) for layer in load(folder).model.model.layers] == [CpuDecoder]
    plant(monkeypatch)
    base = load(folder)
    assert len(base.model.model.layers) == 2
    assert base.layers.linears


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "gpt_oss", "phi3"])
def test_a_window_longer_than_any_prompt_of_the_proof_is_proven_all_the_same(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": model_type, **ARCHITECTURES[model_type], "sliding_window": 64}
    folder = tiny.save_tiny_base(tmp_path, config)
    base = load(folder, torch_backend(CPU))
    assert base.model.config.sliding_window == 64
    assert {
        vars(module)["sliding_window"] for module in base.model.modules() if vars(module).get("sliding_window")
    } <= {64}
    monkeypatch.setattr(DecodeGroup, "mask", lambda self, _window, mask=DecodeGroup.mask: mask(self, None))
    with pytest.raises(UnsupportedModelError, match="something else"):
        load(folder, torch_backend(CPU))


def test_fused_layers_serve_with_the_windows_that_the_model_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[int | None] = []
    layer_cache = CpuKV.layer_cache

    def noted(self: CpuKV, layer: Any, num_heads: int, like: Tensor) -> Any:
        windows.append(layer.window)
        return layer_cache(self, layer, num_heads, like)

    config = {"model_type": "mistral", **ARCHITECTURES["mistral"], "sliding_window": 64}
    base = load(tiny.save_tiny_base(tmp_path, config))
    monkeypatch.setattr(CpuKV, "layer_cache", noted)
    assert [type(layer) for layer in base.model.model.layers] == [CpuDecoder]
    assert logits_of(base).isfinite().all()
    assert windows == [64, 64]


def logits_of(base: BaseModel) -> Tensor:
    """Logits of one prompt in a runner of its own."""
    request = Request("r", (1, 2, 3), SamplingParams(max_tokens=1), lambda _event: None)
    sequence = Sequence(request, 0)
    sequence.block_table = [1]
    return base.runner(1, 4).logits(Batch((rows_of(sequence, 0, 3),)))


def test_the_proofs_adapters_are_the_same_at_every_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[AdapterProof] = []

    def noted(*given: Any) -> AdapterProof:
        made.append(adapter_proof(*given))
        return made[-1]

    monkeypatch.setattr(base_model, "adapter_proof", noted)
    for _ in range(2):
        load(folder)
    for first, second in zip(made[0].expected.logits, made[1].expected.logits, strict=True):
        assert torch.equal(first, second)
    kinds = [use.weights for own in made[0].uses for use in own]
    assert any(weights.embeddings for weights in kinds)
    assert any(weights.replaced for weights in kinds)
