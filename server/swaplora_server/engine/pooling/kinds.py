"""How one vector is made of the hidden states of an input, as sentence-transformers names the ways."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class InputStates(NamedTuple):
    """What a model made of one input; of a decoder's, of the last token alone."""

    states: Tensor  # [num_rows, hidden_size]
    pooled: Tensor | None = None  # [hidden_size], by the base's own pooler


class Reader(Protocol):
    """What requests read of their inputs' hidden states; those of one reader together."""

    @property
    def needs_pooled(self) -> bool:
        """Whether it reads what the base's own pooler made of them too."""

    def __call__(self, inputs: Sequence[InputStates], /) -> Sequence[Tensor]:
        """Of each input a tensor, whose bits do not depend on the others."""


class PoolingKind(enum.StrEnum):
    """Which states count, and how much."""

    CLS = "cls"  # the first
    LAST = "lasttoken"
    MEAN = "mean"
    MEAN_SQRT = "mean_sqrt_len_tokens"  # the sum, divided by the root of how many they are
    WEIGHTED = "weightedmean"  # later ones more
    MAX = "max"  # of each number the largest


@dataclass(frozen=True, slots=True)
class Pooling:
    """A base's own way, and whether its vectors are of length 1 unless somebody wants them otherwise."""

    kind: PoolingKind
    normalises: bool = True

    @property
    def needs_pooled(self) -> bool:
        return False

    def __call__(self, inputs: Sequence[InputStates], /) -> Sequence[Tensor]:
        """See `Reader`."""
        return [self.vector(one.states) for one in inputs]

    def vector(self, states: Tensor) -> Tensor:
        """states: [num_rows, hidden_size] of one input → [hidden_size], float32."""
        states = states.float()
        match self.kind:
            case PoolingKind.CLS:
                return states[0]
            case PoolingKind.LAST:
                return states[-1]
            case PoolingKind.MEAN:
                return states.mean(0)
            case PoolingKind.MEAN_SQRT:
                vector: Tensor = states.sum(0) / len(states) ** 0.5
                return vector
            case PoolingKind.WEIGHTED:
                weights = torch.arange(1, len(states) + 1, dtype=states.dtype, device=states.device)
                return (states * weights[:, None]).sum(0) / weights.sum()
            case PoolingKind.MAX:
                return states.amax(0)


LAST_TOKEN = Pooling(PoolingKind.LAST)
