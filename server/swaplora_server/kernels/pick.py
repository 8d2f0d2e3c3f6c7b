"""Which backend does the heavy work on this machine, picked once at start."""

import os
from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.cpu import abi, build
from swaplora_server.kernels.cpu.backend import CpuBackend
from swaplora_server.kernels.cpu.build import NoCompilerError
from swaplora_server.kernels.cuda.needs import NoTritonError, require_triton
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
    """Triton's kernels on a GPU, native code on a CPU with a compiler; torch's operations where these cannot be had.

    Both are compiled into `cache_dir` the first time. `dtype` is the number format of the base. On a CPU that is
    float32 or bfloat16, the format of its products: rows are float32 there. Raises NoCompilerError for bfloat16 on a
    CPU without a compiler, where torch has no such products.
    """
    if device.type == "cuda":
        return _cuda_backend(device, dtype, cache_dir)
    try:
        library = abi.load_library(cache_dir, report)
    except NoCompilerError as error:
        if dtype != torch.float32:
            raise
        _log.warning(
            "serving without native kernels: several times slower, and a row's last bits depend on those beside it",
            reason=str(error),
        )
        return torch_backend(device)
    return CpuBackend(library, dtype)


def _cuda_backend(device: torch.device, dtype: torch.dtype, cache_dir: Path) -> Backend:
    torch_form = torch_backend(device)
    try:
        require_triton()
    except NoTritonError as error:
        _log.warning("serving without the GPU's own kernels: many adapters at once are slow", reason=str(error))
        return torch_form
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir / "triton"))
    from swaplora_server.kernels.cuda.backend import CudaBackend

    return CudaBackend(device, dtype)


def prefers_bf16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32, through AMX or AMD's AVX512-bf16.

    Intel's AVX512-bf16 without AMX has half the rate of its float32.
    """
    instructions = build.processor_instructions()
    return build.variant().has_tiles or ("avx512_bf16" in instructions and build.is_amd())
