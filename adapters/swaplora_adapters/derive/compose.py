"""One LoRA adapter made of several. Everything is computed on the delta B A: to combine the A and B of two adapters
separately, as PEFT's `linear`, `ties` and `dare` do, mixes each one's A with the other's B.

TIES (arXiv:2306.01708) and DARE (arXiv:2311.03099) are PEFT's own functions. `sum` and `svd` need no delta, and PEFT's
would make one of each: the QR of the factors is exact, and takes no memory as large as a weight.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swaplora_adapters.config.parse import MAX_RANK
from swaplora_adapters.derive.lowrank import LowRank, at_most, cut_factors, cut_matrix
from swaplora_adapters.derive.recipe import Recipe
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.weights.served import AdapterWeights, LinearWeights


class Ingredient(NamedTuple):
    """An adapter, scaling folded in, and how much of it; any sign."""

    weights: AdapterWeights
    scale: float


def compose(ingredients: Sequence[Ingredient], recipe: Recipe, paths: Iterable[str]) -> dict[str, LowRank]:
    """The combination by module, for every module that any of the adapters has.

    `paths` are all modules of the base, in an order that stays: dare draws for one after the other. Raises
    InvalidAdapterError if the ranks add up to more than an adapter may have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed or 0)  # PEFT takes no other
        found = ((path, _parts(ingredients, path)) for path in paths)
        return {path: _combine(path, parts, recipe) for path, parts in found if parts}


class _Part(NamedTuple):
    module: LinearWeights
    scale: float


def _parts(ingredients: Sequence[Ingredient], path: str) -> list[_Part]:
    return [_Part(i.weights.modules[path], i.scale) for i in ingredients if path in i.weights.modules]


def _combine(path: str, parts: Sequence[_Part], recipe: Recipe) -> LowRank:
    rank = recipe.rank or sum(part.module.rank for part in parts)
    if recipe.method == "sum":
        return _stacked(path, parts, rank)
    if recipe.method == "svd":
        return cut_factors(_stacked_A(parts), _stacked_B(parts), at_most(rank))
    return cut_matrix(_merged(parts, recipe), at_most(min(rank, MAX_RANK)))


def _stacked(path: str, parts: Sequence[_Part], rank: int) -> LowRank:
    """[A₁; A₂] and [s₁B₁, s₂B₂], whose product is the sum itself."""
    if rank > MAX_RANK:
        raise InvalidAdapterError(
            [f"the ranks at {path} add up to {rank}, an adapter has at most {MAX_RANK}: use method svd with a rank"]
        )
    return LowRank(_stacked_A(parts), _stacked_B(parts), lost=0.0, total=0.0)


def _stacked_A(parts: Sequence[_Part]) -> Tensor:
    return torch.cat([part.module.lora_A for part in parts])


def _stacked_B(parts: Sequence[_Part]) -> Tensor:
    return torch.cat([part.module.lora_B * part.scale for part in parts], dim=1)


def _merged(parts: Sequence[_Part], recipe: Recipe) -> Tensor:
    """[out, in]."""
    from peft.utils import merge_utils  # brings transformers, which the other methods do without

    merge = {"ties": merge_utils.ties, "dare_linear": merge_utils.dare_linear, "dare_ties": merge_utils.dare_ties}
    scales = torch.tensor([part.scale for part in parts])
    density = 1.0 if recipe.density is None else recipe.density
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a density of 1 drops nothing
        merged: Tensor = merge[recipe.method](
            [part.module.lora_B @ part.module.lora_A for part in parts], scales, density
        )
    return merged
