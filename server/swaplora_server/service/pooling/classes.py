"""Classes of inputs and of their tokens: logits of an adapter's head made into probabilities, and names of labels."""

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
    """The head of who answers, which reads [num_labels] of an input. Raises RequestError where there is none."""
    return _head(uses, "SEQ_CLS", "classifies", "it labels tokens: ask /pooling with the task token_classify")


def token_classifier(uses: Sequence[AdapterUse]) -> Reader:
    """The same of its tokens, of which [num_tokens, num_labels] are read."""
    return _head(uses, "TOKEN_CLS", "labels tokens", "it classifies whole inputs: ask /classify")


def head_of(uses: Sequence[AdapterUse]) -> TaskHead | None:
    """That of who answers, if there is one; a sum has none."""
    head = uses[0].weights.head if len(uses) == 1 else None
    return head if isinstance(head, TaskHead) else None


def _head(uses: Sequence[AdapterUse], task: str, does: str, otherwise: str) -> TaskHead:
    head = head_of(uses)
    if head is None:
        message = f"who answers has no head that {does}: name an adapter whose task_type is {task}"
        raise RequestError("invalid_request", message, "model")
    if head.task != task:
        message = f"the task_type of who answers is {head.task}, not {task}; {otherwise}"
        raise RequestError("invalid_request", message, "model")
    return head


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
    scores = powers / powers.sum(-1, keepdims=True) if exact.shape[-1] > 1 else 1 / (1 + np.exp(-exact))
    activated: Vector = scores.astype(np.float32)
    return activated
