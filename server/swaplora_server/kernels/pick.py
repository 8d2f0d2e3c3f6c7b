"""Which backend does the heavy work on this machine, picked once at start."""

from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.cpu import abi
from swaplora_server.kernels.cpu.backend import CpuBackend
from swaplora_server.kernels.cpu.build import NoCompilerError
from swaplora_server.kernels.torch.backend import TorchBackend

_log = structlog.get_logger(__name__)


def torch_backend(device: torch.device) -> Backend:
    """Torch's own operations, on any device.

    On a GPU without cuDNN's attention, which makes a plan for each length of a context: some 40 ms in every step.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return TorchBackend(device)


def pick_backend(device: torch.device, dtype: torch.dtype, cache_dir: Path, report: Callable[[str], None]) -> Backend:
    """Native code on a CPU with a compiler, compiled into `cache_dir` the first time; torch's operations elsewhere."""
    if device.type != "cpu":
        return torch_backend(device)
    try:
        library = abi.load_library(cache_dir, report)
    except NoCompilerError as error:
        _log.warning(
            "serving without native kernels: several times slower, and a row's last bits depend on those beside it",
            reason=str(error),
        )
        return torch_backend(device)
    if dtype != torch.float32:
        _log.warning("in bf16 a row's last bits depend on those beside it; in fp32 they do not")
    return CpuBackend(library, dtype)
