"""How often each token stands in the sequences that ask for a penalty, and what that does to their logits."""

from collections.abc import Sequence as Rows
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from swaplora_server.engine.request import Sequence
from swaplora_server.engine.sampling.transfers import Outgoing, Sent


class TokenCounts:
    """For each sequence that was ever asked for: the tokens that it has, and how often it has generated each.

    A sequence's counts are brought up to date when they are asked for, by its new tokens alone.
    """

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, dict[int, int]] = WeakKeyDictionary()

    def of(self, sequence: Sequence) -> dict[int, int]:
        """How often each token was generated; 0 for those that only the prompt has, which repetition_penalty counts."""
        counts = self._counts.get(sequence)
        if counts is None:
            request = sequence.request
            prompt_ids = request.prompt_ids if request.params.repetition_penalty != 1.0 else ()
            counts = self._counts[sequence] = dict.fromkeys(prompt_ids, 0)
        num_counted = sum(counts.values())
        for token_id in sequence.generated_ids(num_counted):
            counts[token_id] = counts.get(token_id, 0) + 1
        return counts


class Penalised(NamedTuple):
    """Logits that are made less likely: [n] each, one for every token that stands in a sequence already."""

    rows: Sent
    token_ids: Sent
    num_generated: Sent
    repetition: Sent
    frequency: Sent
    presence: Sent


def put_penalised(sequences: Rows[tuple[int, Sequence]], counts: TokenCounts, outgoing: Outgoing) -> Penalised | None:
    """Of these sequences, each with the number of its row, those that ask for a penalty; None where none does."""
    asked = [(row, sequence, sequence.request.params) for row, sequence in sequences]
    asked = [(row, sequence, params) for row, sequence, params in asked if params.is_penalised]
    if not asked:
        return None
    counted = [counts.of(sequence) for _, sequence, _ in asked]
    lengths = [len(each) for each in counted]
    token_ids, num_generated = (
        np.array(list(chain.from_iterable(parts)), np.int64) for parts in (counted, (each.values() for each in counted))
    )
    penalties = np.array(
        [(params.repetition_penalty, params.frequency_penalty, params.presence_penalty) for *_, params in asked],
        np.float32,
    )
    columns = np.repeat(penalties, lengths, axis=0).T
    rows = np.repeat([row for row, *_ in asked], lengths)
    return Penalised(*map(outgoing.put, (rows, token_ids, num_generated, *columns)))


def penalise(logits: Tensor, asked: Penalised) -> None:
    """Make less likely, in rows of `logits`, what stands in their sequences already; the rest is not touched.

    As vLLM has it: repetition_penalty first, of the prompt and what was generated; then, as OpenAI has them,
    frequency_penalty and presence_penalty of what was generated.
    """
    rows, token_ids, num_generated, repetition, frequency, presence = (sent.tensor for sent in asked)
    places = rows, token_ids
    x = logits[places]
    x = torch.where(x > 0, x / repetition, x * repetition).clamp_(max=torch.finfo(x.dtype).max)
    logits[places] = x - frequency * num_generated - presence * (num_generated > 0)
