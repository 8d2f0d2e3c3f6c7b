"""Whose head reads inputs: that of the adapter that answers, else the one that the base was saved with."""

from collections.abc import Sequence

from swaplora_server.base.base_model import BaseModel
from swaplora_server.base.task_heads import TaskHead
from swaplora_server.engine.pooling.kinds import Reader
from swaplora_server.engine.request import AdapterUse
from swaplora_server.service.errors import RequestError


def head_of(base: BaseModel, uses: Sequence[AdapterUse]) -> TaskHead | None:
    """None where neither has one. An adapter without a head, and a sum, stand before the base's."""
    own = uses[0].weights.head if len(uses) == 1 else None
    return own if isinstance(own, TaskHead) else base.layers.own_head


def labels_of(base: BaseModel, uses: Sequence[AdapterUse]) -> Sequence[str]:
    """What the labels of that head are called; none where they have no names."""
    if len(uses) == 1 and uses[0].weights.head is not None:
        return uses[0].weights.labels
    names: dict[int, str] = base.model.config.id2label
    return [names[number] for number in sorted(names)]


def classifier(base: BaseModel, uses: Sequence[AdapterUse]) -> Reader:
    """The head of who answers, which reads [num_labels] of an input. Raises RequestError where there is none."""
    return _head(base, uses, "SEQ_CLS", "classifies", "it labels tokens: ask /pooling with the task token_classify")


def token_classifier(base: BaseModel, uses: Sequence[AdapterUse]) -> Reader:
    """The same of its tokens, of which [num_tokens, num_labels] are read."""
    return _head(base, uses, "TOKEN_CLS", "labels tokens", "it classifies whole inputs: ask /classify")


def scorer(base: BaseModel, uses: Sequence[AdapterUse]) -> TaskHead | None:
    """The head of one label that scores pairs; None where there is no head. Raises RequestError for any other head."""
    head = head_of(base, uses)
    if head is not None and (head.task, head.num_labels) != ("SEQ_CLS", 1):
        what = "labels tokens" if head.task == "TOKEN_CLS" else f"has {head.num_labels} labels"
        message = f"the head of who answers {what}, and pairs are scored by one of task_type SEQ_CLS with 1 label"
        raise RequestError("invalid_request", message, "model")
    return head


def _head(base: BaseModel, uses: Sequence[AdapterUse], task: str, does: str, otherwise: str) -> TaskHead:
    head = head_of(base, uses)
    if head is None:
        message = f"who answers has no head that {does}: name an adapter whose task_type is {task}"
        raise RequestError("invalid_request", message, "model")
    if head.task != task:
        message = f"the task_type of who answers is {head.task}, not {task}; {otherwise}"
        raise RequestError("invalid_request", message, "model")
    return head
