"""Classes of inputs and of their tokens: logits of a head made into probabilities, and names of labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swaplora_server.engine.request import Vector


@dataclass(frozen=True, slots=True)
class Classified:
    """One input: the likeliest label, and a score of each."""

    label: str
    scores: Vector  # [num_labels]


def classified(logits: Vector, labels: Sequence[str], *, activates: bool) -> Classified:
    """logits: [num_labels]. Of one label alone the score is its own probability, of several they add up to 1.

    Unless it `activates`, scores are the logits.
    """
    best = int(logits.argmax())
    return Classified(labels[best] if labels else f"LABEL_{best}", activated(logits) if activates else logits)


def activated(logits: Vector) -> Vector:
    """The scores of logits [..., num_labels]: those of a token or an input add up to 1, of one label a probability."""
    exact = logits.astype(np.float64)
    powers = np.exp(exact - exact.max(-1, keepdims=True))
    scores = powers / powers.sum(-1, keepdims=True) if exact.shape[-1] > 1 else np.exp(-np.logaddexp(0, -exact))
    found: Vector = scores.astype(np.float32)
    return found
