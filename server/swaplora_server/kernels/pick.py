"""Which code does the heavy work on this machine: the engine's kernels, picked once at start."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import torch
from torch import nn
from transformers import PreTrainedModel

from swaplora_adapters.weights.memory import HugePages
from swaplora_server.engine.attention import PagedKV
from swaplora_server.engine.lora.activation import Activation, LoraOp
from swaplora_server.kernels.cpu import attention as native_attention
from swaplora_server.kernels.cpu import decoder as native_decoder
from swaplora_server.kernels.cpu import linear as native_linear
from swaplora_server.kernels.cpu import lora as native
from swaplora_server.kernels.cpu import quantised_linear
from swaplora_server.kernels.cpu.attention import NativeKV
from swaplora_server.kernels.cpu.build import NoCompilerError
from swaplora_server.kernels.quantised_codes import is_quantised
from swaplora_server.kernels.torch import lora as torch_form
from swaplora_server.kernels.torch import onednn_linear
from swaplora_server.kernels.torch.attention import TorchKV

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The LoRA operation, paged attention, what a base linear is exchanged for, and `native_decoder.fuse`."""

    lora: LoraOp
    paged_kv: Callable[[int, int], PagedKV]  # (number of blocks, block size) →
    prepare_linear: Callable[[nn.Module, HugePages], nn.Module]
    fuse: Callable[[PreTrainedModel, Activation], Callable[[], None] | None] = lambda _model, _activation: None


def torch_kernels(device: torch.device) -> Kernels:
    """Torch's own operations, on any device."""
    return Kernels(torch_form.OP, partial(TorchKV, device=device), lambda linear, _pages: linear)


def pick_kernels(device: torch.device, dtype: torch.dtype, cache_dir: Path, report: Callable[[str], None]) -> Kernels:
    """Native code on a CPU with a compiler, compiled into `cache_dir` the first time; torch's operations elsewhere."""
    if device.type != "cpu":
        return torch_kernels(device)
    try:
        return _native_kernels(dtype, cache_dir, report)
    except NoCompilerError as error:
        _log.warning(
            "serving without native kernels: several times slower, and a row's last bits depend on those beside it",
            reason=str(error),
        )
        return torch_kernels(device)


def _native_kernels(dtype: torch.dtype, cache_dir: Path, report: Callable[[str], None]) -> Kernels:
    lora = native.load_library(cache_dir, report)
    attention = native_attention.load_library(cache_dir, report)
    linear = native_linear.load_library(cache_dir, report)
    decoder = native_decoder.load_library(cache_dir, report)
    quantised = partial(quantised_linear.pack, quantised_linear.load_library(cache_dir, report), linear)
    paged_kv = partial(NativeKV, attention)
    if dtype != torch.float32:
        _log.warning("in bf16 a row's last bits depend on those beside it; in fp32 they do not")
        return Kernels(native.op(lora), paged_kv, partial(_pack, onednn_linear.pack, quantised))
    fuse = partial(native_decoder.fuse, decoder, lora=lora, paged_attention=attention, linear=linear)
    plain = partial(native_linear.pack, linear)
    return Kernels(native.op(lora), paged_kv, partial(_pack, plain, quantised), fuse)


def _pack(
    plain: Callable[[nn.Module, HugePages], nn.Module],
    quantised: Callable[[nn.Module], nn.Module],
    linear: nn.Module,
    pages: HugePages,
) -> nn.Module:
    return quantised(linear) if is_quantised(linear) else plain(linear, pages)
