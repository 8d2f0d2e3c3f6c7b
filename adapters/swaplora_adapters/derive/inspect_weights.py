"""What an adapter does to each module, in numbers: the size and the shape of B A."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from swaplora_adapters.weights.served import AdapterWeights, LinearWeights

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
    """Every module of an adapter that has factors, in order of path."""
    return [_inspect(path, module) for path, module in sorted(weights.modules.items()) if module.rank]


def warnings_about(modules: list[ModuleInspection]) -> list[str]:
    """What a person would want to look at."""
    return [warning for module in modules for warning in _warnings(module)]


@dataclass(frozen=True, slots=True)
class Likeness:
    """How much two adapters point the same way: cosines of their deltas as vectors, from -1 to 1."""

    overall: float | None  # None where one of the two changes nothing
    modules: Mapping[str, float | None]  # of those that both have


def compare_weights(one: AdapterWeights, other: AdapterWeights) -> Likeness:
    """Overall, a module that only one of the two has counts as one where the other is zero."""
    shared = [(path, one.modules[path], other.modules[path]) for path in sorted(one.modules.keys() & other.modules)]
    dots = {path: inner_product(first, second) for path, first, second in shared}
    return Likeness(
        overall=_cosine(sum(dots.values()), squared_norm(one), squared_norm(other)),
        modules={
            path: _cosine(dots[path], inner_product(first, first), inner_product(second, second))
            for path, first, second in shared
        },
    )


def squared_norm(weights: AdapterWeights) -> float:
    """Of all modules' deltas taken together."""
    return sum(inner_product(module, module) for module in weights.modules.values())


def inner_product(one: LinearWeights, other: LinearWeights) -> float:
    """⟨B₁A₁, B₂A₂⟩ = ⟨B₁ᵀB₂, A₁A₂ᵀ⟩ in float64: two products as large as the ranks, and none as large as the weight."""
    left = one.lora_B.double().T @ other.lora_B.double()
    right = one.lora_A.double() @ other.lora_A.double().T
    return float((left * right).sum())


def _cosine(dot: float, one_squared: float, other_squared: float) -> float | None:
    """In bounds that rounding may pass."""
    length = math.sqrt(one_squared) * math.sqrt(other_squared) if min(one_squared, other_squared) > 0 else 0.0
    return max(-1.0, min(1.0, dot / length)) if length else None


def _inspect(path: str, module: LinearWeights) -> ModuleInspection:
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
