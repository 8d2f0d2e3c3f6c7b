"""A GPU's own kernels are picked where they can be had; a base that they fail is served by torch's operations."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import PreTrainedModel

import tiny
from repository import KERNEL_CACHE
from swaplora_server.base import base_model
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.base.loading import _backend
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.config import Settings
from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.cuda.backend import CudaBackend
from swaplora_server.kernels.device_fault import fault_of
from swaplora_server.kernels.pick import pick_backend, torch_backend
from swaplora_server.kernels.step import Segments
from swaplora_server.kernels.torch.backend import TorchBackend
from swaplora_server.kernels.torch.lora import TorchLora

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pick(device: torch.device) -> Backend:
    return pick_backend(device, torch.bfloat16, KERNEL_CACHE, lambda _message: None)


def test_a_gpus_own_kernels_are_picked_and_compiled_into_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert pick(CUDA) == CudaBackend(CUDA, torch.bfloat16)
    assert os.environ["TRITON_CACHE_DIR"] == str(KERNEL_CACHE / "triton")


def test_without_triton_a_gpu_runs_torchs_operations_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with capture_logs() as logs:
        assert isinstance(pick(CUDA), TorchBackend)
    assert "triton" in logs[0]["reason"]


class _Failing(TorchBackend):
    def lora(self, segments: Segments) -> TorchLora:
        raise RuntimeError("no kernel image is available for execution on the device")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_tiny_base(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """How often the base was read."""
    reads: list[object] = []
    load = base_model._load_model  # noqa: SLF001

    def noting(*arguments: Any) -> PreTrainedModel:
        reads.append(arguments[0])
        return load(*arguments)

    monkeypatch.setattr(base_model, "_load_model", noting)
    return reads


def load(folder: Path, backend: Backend, otherwise: Backend | None = None) -> BaseModel:
    return load_base(folder, device=CPU, dtype=torch.float32, backend=backend, otherwise=otherwise)


def test_a_base_that_the_kernels_fail_is_served_without_them(folder: Path, reads: list[object]) -> None:
    with pytest.raises(UnsupportedModelError, match="no kernel image"):
        load(folder, _Failing(CPU))
    with capture_logs() as logs:
        base = load(folder, _Failing(CPU), torch_backend(CPU))
    assert base.backend == torch_backend(CPU)
    assert len(reads) == 3
    (line,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert "torch's operations" in line["event"]
    assert "no kernel image" in line["reason"]


def test_a_fault_that_stays_is_told_with_its_way_out(
    folder: Path, reads: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = "CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(base_model, "fault_of", lambda _device: fault)
    with pytest.raises(UnsupportedModelError, match=f"{fault}.*--kernels torch"):
        load(folder, _Failing(CPU), torch_backend(CPU))
    with pytest.raises(UnsupportedModelError, match=f"{fault}.*torch's own operations"):
        load(folder, _Failing(CPU))
    assert len(reads) == 2, "read again, though nothing can be computed"


def test_a_fault_is_what_the_device_says_when_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_device: torch.device) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert fault_of(CUDA) == "CUDA error: unspecified launch failure"
    assert fault_of(CPU) is None
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    assert fault_of(CUDA) is None


def test_torchs_operations_can_be_asked_for_on_a_gpu_alone(tmp_path: Path) -> None:
    settings = Settings(base="x", kernels="torch", cache_dir=tmp_path)
    assert _backend(settings, CUDA, torch.bfloat16, lambda _message: None) == torch_backend(CUDA)
    with pytest.raises(UnsupportedModelError, match="--kernels torch"):
        _backend(settings, CPU, torch.float32, lambda _message: None)


def test_a_base_that_cannot_be_read_is_read_once_and_kernels_are_not_blamed(folder: Path, reads: list[object]) -> None:
    (folder / "model.safetensors").unlink()
    with capture_logs() as logs, pytest.raises(OSError, match="no file named"):
        load(folder, _Failing(CPU), torch_backend(CPU))
    assert len(reads) == 1
    assert [entry for entry in logs if "kernels" in entry["event"]] == []


def test_a_base_that_nothing_can_serve_is_read_once_and_refused_for_its_own_reason(
    folder: Path, reads: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise UnsupportedModelError("gpt-0 is not supported")

    monkeypatch.setattr(base_model, "expected_logits", refused)
    with capture_logs() as logs, pytest.raises(UnsupportedModelError, match="gpt-0"):
        load(folder, _Failing(CPU), torch_backend(CPU))
    assert len(reads) == 1
    assert [entry for entry in logs if "kernels" in entry["event"]] == []
