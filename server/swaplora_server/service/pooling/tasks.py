"""What vLLM's /pooling may make of inputs: one vector of each, or one of each token, by a head or without."""

from collections.abc import Sequence
from typing import Literal

from swaplora_server.base.task_heads import TaskHead
from swaplora_server.engine.pooling.kinds import Reader
from swaplora_server.engine.request import AdapterUse, Vector
from swaplora_server.service.errors import RequestError
from swaplora_server.service.pooling.classes import activated
from swaplora_server.service.pooling.embeddings import embeddings, normalised
from swaplora_server.service.pooling.heads import classifier, head_of, token_classifier
from swaplora_server.service.pooling.pooling import Pooled
from swaplora_server.service.pooling.tokens import EachToken
from swaplora_server.service.service import Service

Task = Literal["embed", "classify", "token_embed", "token_classify"]


def reader_of(service: Service, task: Task | None, uses: Sequence[AdapterUse]) -> Reader:
    """What reads inputs; where no task is named, the head of who answers if there is one. Raises RequestError."""
    match task:
        case "embed":
            return service.base.pooling
        case "token_embed":
            if service.generates:
                message = "task token_embed is for encoders: of a base that generates the last token's state alone is"
                raise RequestError("unsupported_field", f"{message} read", "task")
            return EachToken(service.base.model.config.hidden_size)
        case "classify":
            return classifier(service.base, uses)
        case "token_classify":
            return token_classifier(service.base, uses)
        case None:
            return head_of(service.base, uses) or service.base.pooling


def finished(
    service: Service, pooled: Pooled, dimensions: int | None = None, *, activates: bool | None
) -> Sequence[Vector]:
    """Of length 1, or probabilities, unless it does not activate; None is as the base has it."""
    if isinstance(pooled.reader, TaskHead):
        return pooled.vectors if activates is False else list(map(activated, pooled.vectors))
    if isinstance(pooled.reader, EachToken):
        return pooled.vectors if activates is False else list(map(normalised, pooled.vectors))
    normalises = service.base.pooling.normalises if activates is None else activates
    return embeddings(pooled.vectors, dimensions, normalises=normalises)
