"""Several deltas of one weight made into one, by methods that look at single entries: TIES (arXiv:2306.01708) and
DARE (arXiv:2311.03099), as PEFT's `merge_utils` computes them.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def ties(deltas: Sequence[Tensor], scales: Tensor, density: float) -> Tensor:
    """Keep each delta's largest entries, elect a sign per entry, and average those that have it."""
    return _elected_mean(torch.stack([_largest(delta, density) for delta in deltas]), scales)


def dare_linear(deltas: Sequence[Tensor], scales: Tensor, density: float, generator: Generator) -> Tensor:
    """Drop entries at random, rescale the rest so that the expectation stays, and sum."""
    kept = torch.stack([_random(delta, density, generator) for delta in deltas])
    return (kept * scales.view(-1, 1, 1)).sum(0)


def dare_ties(deltas: Sequence[Tensor], scales: Tensor, density: float, generator: Generator) -> Tensor:
    """Drop entries at random, then elect signs and average as `ties` does."""
    return _elected_mean(torch.stack([_random(delta, density, generator) for delta in deltas]), scales)


def _largest(delta: Tensor, density: float) -> Tensor:
    """`delta` with zeros for all but this share of its entries; the largest stay."""
    if density == 1:
        return delta
    count = int(density * delta.numel())
    chosen = delta.abs().flatten().topk(count).indices
    return torch.zeros_like(delta).flatten().scatter(0, chosen, delta.flatten()[chosen]).view_as(delta)


def _random(delta: Tensor, density: float, generator: Generator) -> Tensor:
    """`delta` with each entry kept with this probability, and divided by it."""
    if density == 1:
        return delta
    return delta * torch.bernoulli(torch.full_like(delta, density), generator=generator) / density


def _elected_mean(deltas: Tensor, scales: Tensor) -> Tensor:
    """`deltas` are [n, out, in]. The sign is elected before scaling, and what has none or the other does not count."""
    elected = torch.where(deltas.sum(0) >= 0, 1, -1)
    agrees = deltas.sign() == elected
    return (deltas * scales.view(-1, 1, 1) * agrees).sum(0) / agrees.sum(0).clamp(min=1)
