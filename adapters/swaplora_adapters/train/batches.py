"""Which examples a step learns from, and the tensors of these."""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from swaplora_adapters.train.encode import Tokens

IGNORED = -100  # a label that is not learnt
_GROUP = 32  # batches whose examples are put in order of length, so that little is padded
Batch = Sequence[Tokens]


def steps_of(examples: Sequence[Tokens], batch_size: int, epochs: float, seed: int) -> list[Batch]:
    """The batches of all steps, in order, which hangs on the seed alone: each epoch has every example once.

    The whole order is made at once, so that a run which goes on after a checkpoint goes on in it.
    """
    per_epoch = math.ceil(len(examples) / batch_size)
    steps: list[Batch] = []
    for epoch in range(math.ceil(epochs)):
        steps += _epoch(examples, batch_size, random.Random(f"{seed} {epoch}"))
    return steps[: max(1, round(epochs * per_epoch))]


def in_order(examples: Sequence[Tokens], batch_size: int) -> list[Batch]:
    """Batches of like length."""
    ordered = sorted(examples, key=lambda tokens: tokens.length)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _epoch(examples: Sequence[Tokens], batch_size: int, rng: random.Random) -> list[Batch]:
    shuffled = rng.sample(examples, len(examples))
    size = _GROUP * batch_size
    groups = [in_order(shuffled[start : start + size], batch_size) for start in range(0, len(shuffled), size)]
    batches = [batch for group in groups for batch in group]
    rng.shuffle(batches)
    return batches


def collate(batch: Batch, pad_id: int, *, only_learnt: bool) -> dict[str, Tensor | int]:
    """What a causal model takes to give the loss of a batch, padded on the right.

    `only_learnt`: of a model that can leave out the logits of what comes first, those that no learnt token needs are
    left out. Labels are those of the positions whose logits are made.
    """
    longest = max(tokens.length for tokens in batch)
    labels = torch.tensor(
        [
            _padded([i if own else IGNORED for i, own in zip(one.ids, one.is_learnt, strict=True)], longest, IGNORED)
            for one in batch
        ]
    )
    found: dict[str, Tensor | int] = {
        "input_ids": torch.tensor([_padded(tokens.ids, longest, pad_id) for tokens in batch]),
        "attention_mask": torch.tensor([_padded([1] * tokens.length, longest, 0) for tokens in batch]),
        "labels": labels,
    }
    if only_learnt:
        first = int((labels[:, 1:] != IGNORED).any(0).int().argmax())  # whose logits are of the first label
        found |= {"labels": labels[:, first:], "logits_to_keep": longest - first}
    return found


def _padded(row: Sequence[int], length: int, value: int) -> list[int]:
    return [*row, *[value] * (length - len(row))]
