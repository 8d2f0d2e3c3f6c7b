"""Classes of inputs: logits of an adapter's head made into probabilities, and the names of its labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swaplora_server.base.task_heads import TaskHead
from swaplora_server.engine.pooling.kinds import Reader
from swaplora_server.engine.request import AdapterUse, Vector
from swaplora_server.service.errors import RequestError


@dataclass(frozen=True, slots=True)
class Classified:
    """One input: the likeliest label, and a score of each."""

    label: str
    scores: Vector  # [num_labels]


def classifier(uses: Sequence[AdapterUse]) -> Reader:
    """The head of who answers. Raises RequestError where there is none."""
    head = uses[0].weights.head if len(uses) == 1 else None
    if not isinstance(head, TaskHead):
        message = "who answers has no head that classifies: name an adapter whose task_type is SEQ_CLS"
        raise RequestError("invalid_request", message, "model")
    return head


def classified(logits: Vector, labels: Sequence[str], *, activates: bool) -> Classified:
    """logits: [num_labels]. Of one label alone the score is its own probability, of several they add up to 1.

    Unless it `activates`, scores are the logits.
    """
    best = int(logits.argmax())
    return Classified(labels[best] if labels else f"LABEL_{best}", _activated(logits) if activates else logits)


def _activated(logits: Vector) -> Vector:
    exact = logits.astype(np.float64)
    powers = np.exp(exact - exact.max())
    scores = powers / powers.sum() if len(exact) > 1 else 1 / (1 + np.exp(-exact))
    activated: Vector = scores.astype(np.float32)
    return activated
