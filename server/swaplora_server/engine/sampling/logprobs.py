"""Log-probabilities of chosen and of likeliest tokens, of the model's own distribution."""

from collections.abc import Sequence as Rows
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from swaplora_server.engine.request import Logprobs
from swaplora_server.engine.sampling.largest import largest
from swaplora_server.engine.sampling.rows import Row
from swaplora_server.engine.sampling.transfers import Outgoing, send

_LEAST = -9999.0  # JSON has no infinity
_SCORED_TOGETHER = 32  # rows of which there are several numbers for each token of the vocabulary at once


class PendingLogprobs:
    """Those of the rows that ask for them. They may still be computed on a device until they are read."""

    def __init__(self, rows: Rows[Row], outgoing: Outgoing) -> None:
        self._asked = [(row.number, row.params.num_logprobs) for row in rows if row.params.num_logprobs is not None]
        self._numbers = outgoing.put(np.array([number for number, _ in self._asked])) if self._asked else None
        self.packed: tuple[Tensor, ...] = ()  # at most one, to be read

    def compute(self, logits: Tensor, token_ids: Tensor) -> None:
        """logits: [rows, vocab_size], as the model gave them. token_ids: [rows], what was chosen."""
        if self._numbers is not None:
            numbers, most = self._numbers.tensor, max(count for _, count in self._asked)
            self.packed = (_packed(logits[numbers], token_ids[numbers], min(most, logits.shape[-1])),)

    def read(self, packed: Rows[list[float]] = ()) -> dict[int, Logprobs]:
        """By row, of what is in `packed`; of equally likely tokens those come first that do in the vocabulary."""
        return {
            number: _logprobs(chosen, rest, count)
            for (number, count), (chosen, *rest) in zip(self._asked, packed, strict=True)
        }


def scores(logits: Tensor, token_ids: Rows[int], count: int) -> tuple[Logprobs, ...] | None:
    """Of each row the logprob and rank of the token that does come next, and the `count` likeliest.

    logits: [rows, vocab_size]. None when some are not finite.
    """
    found: list[Logprobs] = []
    for start in range(0, len(logits), _SCORED_TOGETHER):
        part = logits[start : start + _SCORED_TOGETHER].float()
        ids = send(token_ids[start : start + _SCORED_TOGETHER], torch.int64, part.device)
        chosen = part.gather(1, ids.unsqueeze(-1))
        ranks = (part > chosen).sum(-1, keepdim=True) + 1
        is_finite = part.amax(-1, keepdim=True).isfinite()
        packed = torch.cat((is_finite.double(), ranks.double(), _packed(part, ids, min(count, part.shape[-1]))), -1)
        for all_finite, rank, chosen_logprob, *top in packed.tolist():
            if not all_finite:
                return None
            found.append(replace(_logprobs(chosen_logprob, top, count), rank=int(rank)))
    return tuple(found)


def _packed(logits: Tensor, token_ids: Tensor, count: int) -> Tensor:
    """Of each row the chosen token's, the `count` largest, and their tokens, as doubles: these hold both exactly."""
    logprobs = logits.log_softmax(-1).clamp_(min=_LEAST)
    chosen = logprobs.gather(1, token_ids.unsqueeze(-1))
    if not count:
        return chosen.double()
    values, places = largest(logprobs, count)
    return torch.cat((chosen.double(), values.double(), places.double()), dim=-1)


def _logprobs(chosen: float, packed: Rows[float], count: int) -> Logprobs:
    values, places = packed[: len(packed) // 2], packed[len(packed) // 2 :]
    return Logprobs(chosen, tuple(zip(map(int, places[:count]), values[:count], strict=True)))
