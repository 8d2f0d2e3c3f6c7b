"""A GPU that is too small is said at start, by the name of the setting to change, and not by the first request."""

from pathlib import Path
from typing import NoReturn

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from transformers import AutoModelForCausalLM

from serving import serving, settings
from swaplora_server.base import device_memory
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.engine.scheduler import Batch
from swaplora_server.kernels.pick import torch_backend
from swaplora_server.kernels.torch.attention import TorchKV
from swaplora_server.service.service import Service

KV_BYTES, ADAPTER_BYTES = 1 << 20, 1 << 22


def out_of_memory(*_: object, **__: object) -> NoReturn:
    raise torch.OutOfMemoryError("out of memory")


@pytest.fixture
def service(base: Path, tmp_path: Path) -> Service:
    return Service(settings(base, tmp_path, kv_cache_bytes=KV_BYTES, adapter_memory_bytes=ADAPTER_BYTES))


def let_be_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(device_memory, "free_bytes", lambda _device: free)


def refusal_of(service: Service) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        service.start(lambda _message: None)
    return str(caught.value)


def test_a_kv_cache_beyond_what_is_free_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    let_be_free(monkeypatch, KV_BYTES - 1)
    refusal = refusal_of(service)
    assert f"--kv-cache-bytes asks for {KV_BYTES} " in refusal
    assert f" {KV_BYTES - 1} free" in refusal


def test_a_kv_cache_that_leaves_no_room_to_compute_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_be_free(monkeypatch, KV_BYTES)
    monkeypatch.setattr("swaplora_server.engine.runner.Runner.run", out_of_memory)
    assert "--kv-cache-bytes" in refusal_of(service)


def test_a_base_beyond_the_gpus_memory_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", out_of_memory)
    assert "--quantization" in refusal_of(service)


def test_the_kv_cache_and_the_longest_step_have_their_memory_before_the_first_request(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Batch]
) -> None:
    let_be_free(monkeypatch, 1 << 40)
    made: list[Tensor] = []
    allocate = TorchKV._allocate  # noqa: SLF001 - when memory is taken shows nowhere else

    def noted(self: TorchKV, like: Tensor) -> Tensor:
        made.append(allocate(self, like))
        return made[-1]

    monkeypatch.setattr(TorchKV, "_allocate", noted)
    monkeypatch.setattr("swaplora_server.base.base_model.pick_backend", lambda device, *_: torch_backend(device))
    with serving(settings(base, tmp_path, max_batch_tokens=40)):
        assert len(made) == 4 * 2 * 2, "keys and values of both layers, for three runs of the proof and the engine"
        assert [[rows.num_rows for rows in batch.rows] for batch in steps] == [[40]]


@pytest.mark.parametrize(("missing", "is_warned"), [(0, False), (1, True)])
def test_adapters_that_will_not_fit_beside_it_are_warned_of(
    missing: int, is_warned: bool, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_be_free(monkeypatch, KV_BYTES + ADAPTER_BYTES - missing)
    with capture_logs() as log:
        service.start(lambda _message: None)
        service.stop()
    assert any("--adapter-memory-bytes" in entry["event"] for entry in log) == is_warned


def test_host_memory_for_adapters_is_refused_where_there_is_no_other(base: Path, tmp_path: Path) -> None:
    refusal = refusal_of(Service(settings(base, tmp_path, host_adapter_bytes=1 << 20)))
    assert "--host-adapter-bytes" in refusal
    with serving(settings(base, tmp_path / "none", host_adapter_bytes=0)) as server:
        assert server.client.get("/health/ready").status_code == 200
