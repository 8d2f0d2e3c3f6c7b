"""One LoRA adapter made of several. Everything is computed on the delta B A: to combine the A and B of two adapters
separately, as PEFT's `linear`, `ties` and `dare` do, mixes each one's A with the other's B.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch

from swaplora_adapters.config.parse import MAX_RANK
from swaplora_adapters.derive.delta_merge import dare_linear, dare_ties, ties
from swaplora_adapters.derive.lowrank import LowRank, at_most, cut_factors, cut_matrix
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights

Method = Literal["sum", "svd", "ties", "dare_linear", "dare_ties"]
# What each method needs to be told, and what it may be told as well.
REQUIRED: Mapping[Method, frozenset[str]] = {
    "sum": frozenset(),
    "svd": frozenset({"rank"}),
    "ties": frozenset({"density"}),
    "dare_linear": frozenset({"density"}),
    "dare_ties": frozenset({"density"}),
}
OPTIONAL: Mapping[Method, frozenset[str]] = {
    "sum": frozenset(),
    "svd": frozenset(),
    "ties": frozenset({"rank"}),
    "dare_linear": frozenset({"rank", "seed"}),
    "dare_ties": frozenset({"rank", "seed"}),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How adapters are combined. What is None is not given, and REQUIRED and OPTIONAL say what may be."""

    method: Method
    density: float | None = None  # the share of entries that ties and dare keep, in (0, 1]
    rank: int | None = None  # the most that a module keeps; None keeps the sum of the ranks
    seed: int | None = None  # of what dare drops; None is 0

    def told(self) -> dict[str, Any]:
        """What was given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Ingredient(NamedTuple):
    """An adapter, scaling folded in, and how much of it; any sign."""

    weights: AdapterWeights
    scale: float


def compose(ingredients: Sequence[Ingredient], recipe: Recipe, paths: Iterable[str]) -> dict[str, LowRank]:
    """The combination by module, for every module that any of the adapters has.

    `paths` are all modules of the base, in an order that stays: dare draws for one after the other. Raises
    InvalidAdapterError if the ranks add up to more than an adapter may have.
    """
    generator = torch.Generator().manual_seed(recipe.seed or 0)
    found = ((path, _parts(ingredients, path)) for path in paths)
    return {path: _combine(path, parts, recipe, generator) for path, parts in found if parts}


class _Part(NamedTuple):
    module: ModuleWeights
    scale: float


def _parts(ingredients: Sequence[Ingredient], path: str) -> list[_Part]:
    return [_Part(i.weights.modules[path], i.scale) for i in ingredients if path in i.weights.modules]


def _combine(path: str, parts: Sequence[_Part], recipe: Recipe, generator: torch.Generator) -> LowRank:
    rank = recipe.rank or sum(part.module.rank for part in parts)
    if recipe.method == "sum":
        return _stacked(path, parts, rank)
    if recipe.method == "svd":
        return cut_factors(_stacked_A(parts), _stacked_B(parts), at_most(rank))
    return cut_matrix(_merged(parts, recipe, generator), at_most(min(rank, MAX_RANK)))


def _stacked(path: str, parts: Sequence[_Part], rank: int) -> LowRank:
    """[A₁; A₂] and [s₁B₁, s₂B₂], whose product is the sum itself."""
    if rank > MAX_RANK:
        raise InvalidAdapterError(
            [f"the ranks at {path} add up to {rank}, an adapter has at most {MAX_RANK}: use method svd with a rank"]
        )
    return LowRank(_stacked_A(parts), _stacked_B(parts), lost=0.0, total=0.0)


def _stacked_A(parts: Sequence[_Part]) -> torch.Tensor:
    return torch.cat([part.module.lora_A for part in parts])


def _stacked_B(parts: Sequence[_Part]) -> torch.Tensor:
    return torch.cat([part.module.lora_B * part.scale for part in parts], dim=1)


def _merged(parts: Sequence[_Part], recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    deltas = [part.module.lora_B @ part.module.lora_A for part in parts]
    scales = torch.tensor([part.scale for part in parts])
    density = 1.0 if recipe.density is None else recipe.density
    if recipe.method == "ties":
        return ties(deltas, scales, density)
    merge = dare_linear if recipe.method == "dare_linear" else dare_ties
    return merge(deltas, scales, density, generator)
