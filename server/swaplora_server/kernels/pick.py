"""Which backend does the heavy work on this machine, picked once at start."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog
import torch
from torch import nn

from swaplora_adapters.weights.memory import HugePages
from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.cpu import abi, onednn_linear, quantised_linear
from swaplora_server.kernels.cpu import decoder as cpu_decoder
from swaplora_server.kernels.cpu import linear as cpu_linear
from swaplora_server.kernels.cpu import lora as cpu_lora
from swaplora_server.kernels.cpu.adapter_tables import AdapterTables
from swaplora_server.kernels.cpu.attention import CpuKV
from swaplora_server.kernels.cpu.build import NoCompilerError
from swaplora_server.kernels.quantised_codes import is_quantised
from swaplora_server.kernels.torch import lora as torch_lora
from swaplora_server.kernels.torch.attention import TorchKV

_log = structlog.get_logger(__name__)


def torch_backend(device: torch.device) -> Backend:
    """Torch's own operations, on any device.

    On a GPU without cuDNN's attention, which makes a plan for each length of a context: some 40 ms in every step.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return Backend(torch_lora.OP, partial(TorchKV, device=device), lambda linear, _pages: linear)


def pick_backend(device: torch.device, dtype: torch.dtype, cache_dir: Path, report: Callable[[str], None]) -> Backend:
    """Native code on a CPU with a compiler, compiled into `cache_dir` the first time; torch's operations elsewhere."""
    if device.type != "cpu":
        return torch_backend(device)
    try:
        return _cpu_backend(dtype, cache_dir, report)
    except NoCompilerError as error:
        _log.warning(
            "serving without native kernels: several times slower, and a row's last bits depend on those beside it",
            reason=str(error),
        )
        return torch_backend(device)


def _cpu_backend(dtype: torch.dtype, cache_dir: Path, report: Callable[[str], None]) -> Backend:
    library = abi.load_library(cache_dir, report)
    lora, paged_kv = cpu_lora.op(library), partial(CpuKV, library)
    quantised = partial(quantised_linear.pack, library)
    if dtype != torch.float32:
        _log.warning("in bf16 a row's last bits depend on those beside it; in fp32 they do not")
        return Backend(lora, paged_kv, partial(_pack, onednn_linear.pack, quantised), AdapterTables)
    plain = partial(cpu_linear.pack, library)
    return Backend(lora, paged_kv, partial(_pack, plain, quantised), AdapterTables, partial(cpu_decoder.wrap, library))


def _pack(
    plain: Callable[[nn.Module, HugePages], nn.Module],
    quantised: Callable[[nn.Module, HugePages], nn.Module],
    linear: nn.Module,
    pages: HugePages,
) -> nn.Module:
    return (quantised if is_quantised(linear) else plain)(linear, pages)
