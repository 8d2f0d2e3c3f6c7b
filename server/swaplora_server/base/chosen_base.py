"""The base that the settings name, made ready in the way they ask for."""

from collections.abc import Callable
from pathlib import Path

import transformers

from swaplora_server.base.base_model import BaseModel, load_base, pick_device, pick_dtype
from swaplora_server.config import EMBEDDED, Settings
from swaplora_server.embedded import ensure_embedded_base
from swaplora_server.kernels.pick import pick_backend


def load_chosen_base(settings: Settings, report: Callable[[str], None]) -> BaseModel:
    """Load the base on its device, in its number format, with this machine's backend. `report` hears each step.

    Raises UnsupportedModelError, EmbeddedBaseError, OSError and ValueError, each with a message for the operator.
    """
    transformers.logging.disable_progress_bar()
    source = source_of(settings, report)
    report(f"loading {settings.base_id}")
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    backend = pick_backend(device, dtype, settings.cache_dir / "native", report)
    return load_base(source, device=device, dtype=dtype, backend=backend, quantization=settings.quantization)


def source_of(settings: Settings, report: Callable[[str], None]) -> str | Path:
    """What transformers loads from. A path that leads nowhere would be taken for a hub id, and refused as a bad one."""
    if settings.base == EMBEDDED:
        return ensure_embedded_base(settings.cache_dir, report)
    if settings.base.startswith(("/", ".")) and not Path(settings.base).is_dir():
        raise NotADirectoryError(f"{settings.base} is no folder: name a folder with a model, a hub id, or {EMBEDDED}")
    return settings.base
