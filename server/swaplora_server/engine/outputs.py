"""What a forward leaves for sampling; of recorded steps, always in the same place."""

from typing import NamedTuple

import torch
from torch import Tensor

from swaplora_server.engine.sampling.groups import argmax


class Greedy(NamedTuple):
    """The likeliest token of each row of logits, and whether its logit is a number."""

    token_ids: Tensor  # int64 [num_rows]
    is_finite: Tensor  # bool [num_rows]

    @classmethod
    def of(cls, logits: Tensor) -> "Greedy":
        """logits: [num_rows, vocab_size]. One NaN in a row is its largest."""
        best, token_ids = argmax(logits)
        return cls(token_ids, best.isfinite())


class RowOutputs(NamedTuple):
    """Of each row that samples: its logits, and what is likeliest in them."""

    logits: Tensor  # float32 [num_rows, vocab_size]
    greedy: Greedy


class RecordedOutputs:
    """Room for the outputs of as many rows as the first forward has, which is the largest."""

    def __init__(self) -> None:
        self._room: RowOutputs | None = None

    def keep(self, logits: Tensor) -> None:
        """Those of a forward, [num_rows, vocab_size], until the next."""
        if self._room is None:
            self._room = _room_like(logits)
        kept = self.rows(len(logits))
        kept.logits.copy_(logits)
        for room, found in zip(kept.greedy, Greedy.of(kept.logits), strict=True):
            room.copy_(found)

    def rows(self, count: int) -> RowOutputs:
        """The first so many, which the next step writes over."""
        assert self._room is not None
        logits, greedy = self._room
        return RowOutputs(logits[:count], Greedy(greedy.token_ids[:count], greedy.is_finite[:count]))


def _room_like(logits: Tensor) -> RowOutputs:
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    return RowOutputs(
        torch.empty_like(logits, dtype=torch.float32), Greedy(token_ids, torch.empty_like(token_ids, dtype=torch.bool))
    )
