"""Fused layers over joined linears, recorded, say what the model's own layers say one operation at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import plain_kernels
import tape
import tiny
from swaplora_server.base.base_model import load_base
from swaplora_server.engine.lora import joined
from swaplora_server.engine.lora.modules import LoraLinear
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels.cuda.backend import CudaBackend
from swaplora_server.kernels.cuda.decoder import CudaDecoder
from swaplora_server.kernels.pick import torch_backend
from test_graphs import Rows, adapter, assert_replayed, use

CPU = torch.device("cpu")
QWEN: dict[str, Any] = {**tiny.LLAMA, "model_type": "qwen3", "head_dim": 8, "sliding_window": None}


@pytest.mark.parametrize("overrides", [tiny.LLAMA, QWEN, {**tiny.LLAMA, "model_type": "qwen2"}])
def test_recorded_steps_of_fused_layers_say_what_torchs_operations_say(
    overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapters on all linears, sums, and rows of the base; in buckets that are filled and such that are not."""
    plain_kernels.put_in_place(monkeypatch)
    folder = tiny.save_tiny_base(tmp_path, overrides)
    base, of_torch = (
        load_base(folder, device=CPU, dtype=torch.float32, backend=backend)
        for backend in (CudaBackend(CPU, torch.float32, tape.TapeRecorder), torch_backend(CPU))
    )
    (fused,) = base.model.model.layers
    assert isinstance(fused, CudaDecoder)
    rows, others = Rows(base, 4), Rows(of_torch, 4)
    rows.runner.record([1, 2, 4])
    ours, theirs = ([adapter(each, seed, is_scaled=seed == 1) for seed in (1, 2)] for each in (base, of_torch))
    for count in (4, 1, 3):
        logits = [
            (
                assert_replayed(own.runner, own.batch(uses[:count]))
                if own is rows
                else own.runner.logits(own.batch(uses[:count]))
            )
            for own, (one, two) in ((rows, ours), (others, theirs))
            for uses in ([use(one), (), use(two) + use(one, -0.5), use(two)],)
        ]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_what_is_kept_of_a_step_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was multiplied at once has been called for when a step ends."""
    plain_kernels.put_in_place(monkeypatch)
    made: list[joined.Joined] = []
    init = joined.Joined.__init__

    def noted(self: joined.Joined, linears: Sequence[LoraLinear]) -> None:
        init(self, linears)
        made.append(self)

    monkeypatch.setattr(joined.Joined, "__init__", noted)
    folder = tiny.save_tiny_base(tmp_path, {**tiny.LLAMA, "num_hidden_layers": 1})
    base = load_base(folder, device=CPU, dtype=torch.float32, backend=CudaBackend(CPU, torch.float32))
    rows = Rows(base, 1)
    rows.runner.logits(Batch((rows_of(Rows.sequence(rows.prompts[0], rows.tables[0], ()), 0, 1),)))
    assert len(made) == 2
    assert all(group._x is None and not group._outputs for group in made)  # noqa: SLF001 - it shows nowhere else
