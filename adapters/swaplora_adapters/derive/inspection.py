"""What an adapter does to each module, in numbers: the size and the shape of B A."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from swaplora_adapters.artifact.weights import AdapterWeights, ModuleWeights

_NEGLIGIBLE = 1e-6  # of the largest singular value: float32's own noise


@dataclass(frozen=True, slots=True)
class ModuleInspection:
    """One module's delta, scaling included."""

    module: str
    rank: int
    norm: float  # Frobenius
    spectral_norm: float
    effective_rank: float  # exp of the entropy of the normalised singular values; 0 for a delta of zero
    singular_values: tuple[float, ...]  # largest first


def inspect_weights(weights: AdapterWeights) -> list[ModuleInspection]:
    """Every module of an adapter, in order of path."""
    return [_inspect(path, module) for path, module in sorted(weights.modules.items())]


def warnings_about(modules: list[ModuleInspection]) -> list[str]:
    """What a person would want to look at."""
    return [warning for module in modules for warning in _warnings(module)]


def _inspect(path: str, module: ModuleWeights) -> ModuleInspection:
    values = singular_values(module.lora_A, module.lora_B)
    return ModuleInspection(
        module=path,
        rank=module.lora_A.shape[0],
        norm=float(values.square().sum().sqrt()),
        spectral_norm=float(values[0]),
        effective_rank=_effective_rank(values),
        singular_values=tuple(values.tolist()),
    )


def singular_values(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """[rank] of lora_B [out, rank] @ lora_A [rank, in] in float64, largest first.

    From the two triangles of a QR of each factor, so that the product, as large as the base's weight, is never made.
    In float64, in which not even the square of a product of the largest float32 values overflows.
    """
    right = torch.linalg.qr(lora_A.double().T, mode="r").R
    left = torch.linalg.qr(lora_B.double(), mode="r").R
    values = torch.linalg.svdvals(left @ right.T)
    return torch.nn.functional.pad(values, (0, lora_A.shape[0] - len(values)))


def _effective_rank(values: Tensor) -> float:
    """Roy and Vetterli, "The effective rank: a measure of effective dimensionality", 2007."""
    total = values.sum()
    if not total:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def _warnings(module: ModuleInspection) -> Iterator[str]:
    if not module.norm:
        yield f"{module.module}: B A is zero, so the adapter changes nothing here"
        return
    idle = sum(value <= _NEGLIGIBLE * module.spectral_norm for value in module.singular_values)
    if idle:
        yield f"{module.module}: {idle} of {module.rank} ranks carry nothing; a smaller rank would give the same"
