"""Which code does the heavy work on this machine: the engine's three kernels, picked once at start."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from torch import nn

from swaplora_adapters.apply.activation import LoraOp
from swaplora_adapters.apply.ops import native, torch_form
from swaplora_adapters.native.build import NoCompilerError
from swaplora_server.engine import native_attention, native_linear, onednn_linear
from swaplora_server.engine.attention import DecodeKernel

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The LoRA operation, decode attention (None: torch's own), and what a base linear is exchanged for."""

    lora: LoraOp
    decode: DecodeKernel | None
    prepare_linear: Callable[[nn.Module], nn.Module]


TORCH = Kernels(torch_form.OP, None, lambda linear: linear)


def pick_kernels(device: torch.device, dtype: torch.dtype, cache_dir: Path, report: Callable[[str], None]) -> Kernels:
    """Native code on a CPU with a compiler, compiled into `cache_dir` the first time; torch's operations elsewhere."""
    if device.type != "cpu":
        return TORCH
    try:
        return Kernels(
            native.load(cache_dir, report),
            native_attention.load(cache_dir, report),
            native_linear.load(cache_dir, report) if dtype == torch.float32 else onednn_linear.pack,
        )
    except NoCompilerError as error:
        _log.warning("serving without native kernels, several times slower", reason=str(error))
        return TORCH
