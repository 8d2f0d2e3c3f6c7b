"""An adapter of another kind made into LoRA: per module the smallest rank that keeps a share of the delta's energy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swaplora_adapters.derive.convertible import Convertible, read_convertible
from swaplora_adapters.derive.lowrank import LowRank, with_energy
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.complaints import capped, quoted
from swaplora_adapters.files.tensorfile import read_tensors
from swaplora_adapters.fit.base import LinearShape


@dataclass(frozen=True, slots=True)
class Converted:
    """What `convert` made, by module."""

    source: Convertible
    modules: Mapping[str, LowRank]


def convert(
    config_path: Path, weights_path: Path, shapes: Mapping[str, LinearShape], energy: float = 0.99
) -> Converted:
    """Read, check and convert the two files of an adapter.

    `energy` in (0, 1] is the share of the sum of squared singular values that each module keeps: what is lost is at
    most √(1 - energy) of its norm. Raises InvalidAdapterError and UnsupportedAdapterError like an upload.
    """
    source = read_convertible(config_path, weights_path, shapes)
    tensors = read_tensors(weights_path, source.header)
    _check_finite(tensors)
    projections, limit = source.projections(), with_energy(energy)
    modules = {}
    for path, module in source.modules.items():
        own = {part: tensors[name] for part, name in source.names[path].items()}
        modules[path] = source.kind.cut({**own, **projections}, module, limit)
    return Converted(source, modules)


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InvalidAdapterError(capped([f"{quoted(name)} holds NaN or infinity" for name in broken]))
