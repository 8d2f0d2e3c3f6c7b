"""Which base is loaded, where it lies, and on what, in which number format and with which kernels it runs."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig

from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.base.encoder.encoder_base import is_encoder, load_encoder
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.config import EMBEDDED, Settings
from swaplora_server.embedded import EMBEDDED_BASES, ensure_embedded_base
from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.cpu.build import NoCompilerError
from swaplora_server.kernels.pick import pick_backend, prefers_bf16, torch_backend
from swaplora_server.kernels.torch.backend import TorchBackend


def pick_device(wanted: str) -> torch.device:
    """auto takes a GPU where there is one. Raises UnsupportedModelError when cuda is wanted and absent."""
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise UnsupportedModelError("no CUDA device was found: start with --device cpu, or check the driver")
    return torch.device("cuda" if has_cuda and wanted != "cpu" else "cpu")


def pick_dtype(wanted: str, device: torch.device, stored: torch.dtype | None) -> torch.dtype:
    """The number format of a base that is `stored` in one. auto is bfloat16 on a GPU, and on a CPU what is faster.

    Raises UnsupportedModelError when float16 is wanted of a CPU.
    """
    if wanted == "auto":
        is_faster = device.type != "cpu" or (stored == torch.bfloat16 and prefers_bf16())
        return torch.bfloat16 if is_faster else torch.float32
    if wanted == "float16" and device.type == "cpu":
        raise UnsupportedModelError(
            "processors have no products of float16: start with --dtype float32, or with bfloat16 or auto"
        )
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def load_chosen_base(settings: Settings, report: Callable[[str], None]) -> BaseModel:
    """Load the base on its device, in its number format, with this machine's backend. `report` hears each step.

    Raises UnsupportedModelError, EmbeddedBaseError, OSError and ValueError, each with a message for the operator.
    """
    transformers.logging.disable_progress_bar()
    source = source_of(settings, report)
    report(f"loading {settings.base_id}")
    device = pick_device(settings.device)
    config = AutoConfig.from_pretrained(source)
    dtype = pick_dtype(settings.dtype, device, config.dtype)
    backend = _backend(settings, device, dtype, report)
    rows = torch.float32 if device.type == "cpu" else dtype
    is_plain = device.type == "cpu" or isinstance(backend, TorchBackend)
    otherwise = None if is_plain else torch_backend(device)
    quantization = settings.quantization
    if is_encoder(config):
        if quantization is not None:
            raise UnsupportedModelError("--quantization is for bases that generate: leave it out for an encoder")
        return load_encoder(source, device=device, dtype=rows, backend=otherwise or backend)
    return load_base(source, device=device, dtype=rows, backend=backend, otherwise=otherwise, quantization=quantization)


def _backend(settings: Settings, device: torch.device, dtype: torch.dtype, report: Callable[[str], None]) -> Backend:
    """This machine's, unless torch's operations are asked for. Without a compiler, auto is float32."""
    if settings.kernels == "torch":
        if device.type == "cpu":
            raise UnsupportedModelError("--kernels torch is for a GPU whose own kernels fail: leave it out on a CPU")
        return torch_backend(device)
    cache = settings.cache_dir / "native"
    try:
        return pick_backend(device, dtype, cache, report)
    except NoCompilerError as error:
        if settings.dtype == "auto":
            return pick_backend(device, torch.float32, cache, report)
        raise UnsupportedModelError(
            f"--dtype bfloat16 needs native kernels on a CPU: install a C++ compiler, or leave it out ({error})"
        ) from error


def source_of(settings: Settings, report: Callable[[str], None]) -> str | Path:
    """What transformers loads from. A path that leads nowhere would be taken for a hub id, and refused as a bad one."""
    if settings.base in EMBEDDED_BASES:
        return ensure_embedded_base(settings.cache_dir, report, EMBEDDED_BASES[settings.base])
    if settings.base.startswith(("/", ".")) and not Path(settings.base).is_dir():
        raise NotADirectoryError(f"{settings.base} is no folder: name a folder with a model, a hub id, or {EMBEDDED}")
    return settings.base
