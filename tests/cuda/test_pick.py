"""A GPU's own kernels are picked where they can be had; a base that they fail is served by torch's operations."""

from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

import tiny
from repository import KERNEL_CACHE
from swaplora_server.base.base_model import load_base, load_with_either
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.cuda.backend import CudaBackend
from swaplora_server.kernels.pick import pick_backend, torch_backend
from swaplora_server.kernels.step import Segments
from swaplora_server.kernels.torch.backend import TorchBackend
from swaplora_server.kernels.torch.lora import TorchLora

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pick(device: torch.device) -> Backend:
    return pick_backend(device, torch.bfloat16, KERNEL_CACHE, lambda _message: None)


def test_a_gpus_own_kernels_are_picked() -> None:
    assert pick(CUDA) == CudaBackend(CUDA, torch.bfloat16)


def test_without_triton_a_gpu_runs_torchs_operations_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with capture_logs() as logs:
        assert isinstance(pick(CUDA), TorchBackend)
    assert "triton" in logs[0]["reason"]


class _Failing(TorchBackend):
    def lora(self, segments: Segments) -> TorchLora:
        raise RuntimeError("no kernel image is available for execution on the device")


def test_a_base_that_the_kernels_fail_is_served_without_them(tmp_path: Path) -> None:
    folder = tiny.save_tiny_base(tmp_path)

    def load(backend: Backend) -> object:
        return load_base(folder, device=CPU, dtype=torch.float32, backend=backend)

    with pytest.raises(UnsupportedModelError, match="no kernel image"):
        load(_Failing(CPU))
    with capture_logs() as logs:
        base = load_with_either(
            lambda backend: load_base(folder, device=CPU, dtype=torch.float32, backend=backend),
            _Failing(CPU),
            torch_backend(CPU),
        )
    assert base.backend == torch_backend(CPU)
    (line,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert "torch's operations" in line["event"]
    assert "no kernel image" in line["reason"]


def test_a_base_that_nothing_can_serve_is_refused_for_its_own_reason() -> None:
    def load(backend: Backend) -> object:
        raise UnsupportedModelError("gpt-0 is not supported")

    with pytest.raises(UnsupportedModelError, match="gpt-0"):
        load_with_either(load, _Failing(CPU), torch_backend(CPU))  # type: ignore[arg-type]
