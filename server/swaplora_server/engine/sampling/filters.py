"""What top_k, top_p and min_p leave of rows of probabilities: each filters what the one before it has left.

Sums of probabilities are sums of integers, multiples of 2^-60, so that no order of adding changes them. Rows are not
sorted whole while some of their likeliest tokens tell what is kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from swaplora_server.engine.sampling.groups import group_sum
from swaplora_server.engine.sampling.largest import largest

_RUNGS = (256, 4096)  # how many of a row's tokens are looked at first, and then, before all of them
_GROUP = 256
_UNIT = 2.0**60


@dataclass(frozen=True, slots=True)
class Likeliest:
    """How many of the likeliest tokens each row may keep, and which share of their probability they are to make up."""

    top_k: Tensor  # int64 [rows, 1]; the size of the vocabulary where none is asked for
    top_p: Tensor  # float64 [rows, 1]; 1 where none is asked for
    most: int  # no row has a larger top_k

    def of(self, rows: Tensor) -> "Likeliest":
        return Likeliest(self.top_k[rows], self.top_p[rows], self.most)


def keep_likeliest(probs: Tensor, asked: Likeliest, rungs: tuple[int, ...] = _RUNGS) -> None:
    """Set to 0, in `probs` [rows, vocab_size], all but the top_k likeliest, and of these what top_p drops.

    The likeliest is always kept, and of equally likely ones those that come first in the vocabulary.
    """
    vocab_size = probs.shape[-1]
    count = min(asked.most, *rungs[:1], vocab_size)
    values, places = largest(probs, count)
    is_kept = _kept(values, asked, _mass(group_sum(probs, _GROUP)).sum(-1, keepdim=True), vocab_size)
    if count == min(asked.most, vocab_size):
        probs.zero_().scatter_(1, places, values.masked_fill_(~is_kept, 0.0))
        return
    is_open = (asked.top_k > count).squeeze(-1) & (is_kept[:, -1] | (asked.top_k < vocab_size).squeeze(-1))
    rest = is_open.nonzero().squeeze(-1)
    remaining = probs[rest]
    probs.zero_().scatter_(1, places, values.masked_fill_(~is_kept, 0.0))
    if len(rest):
        keep_likeliest(remaining, asked.of(rest), rungs[1:])
        probs[rest] = remaining


def keep_probable(probs: Tensor, min_p: Tensor) -> None:
    """Set to 0, in `probs` [rows, vocab_size], what is less likely than `min_p` [rows, 1] times the likeliest."""
    probs.masked_fill_(probs < min_p * probs.amax(-1, keepdim=True), 0.0)


def _kept(values: Tensor, asked: Likeliest, total: Tensor, vocab_size: int) -> Tensor:
    """Which of a row's likeliest tokens are kept, where no others can be. `total` is the mass of the whole row."""
    is_within = torch.arange(values.shape[-1], device=values.device) < asked.top_k
    masses = _mass(values) * is_within
    total = torch.where(asked.top_k < vocab_size, masses.sum(-1, keepdim=True), total)
    before = masses.cumsum(-1) - masses
    wanted = (asked.top_p * total).ceil().long()
    return is_within & ((before < wanted) | (asked.top_p >= 1.0))


def _mass(probs: Tensor) -> Tensor:
    return (probs.double() * _UNIT).long()
