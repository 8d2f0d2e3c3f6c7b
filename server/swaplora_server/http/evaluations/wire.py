"""The body of POST /v1/evaluations. Imports no torch."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, Tag

from swaplora_server.http.transport.models import LIST, TEXT, ClosedModel, text_or_list

MAX_MODELS = 8
MAX_TOKENS = 4096
MAX_STOPS = 16

TaskText = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[Any], Tag(LIST)],
    text_or_list("JSONL as text, or a list of objects"),
]


class EvaluationBody(ClosedModel):
    """A task, and who is to be asked."""

    has_content: ClassVar[bool] = True

    task: TaskText
    models: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(min_length=1, max_length=MAX_MODELS)
    max_tokens: int = Field(256, ge=1, le=MAX_TOKENS)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field([], max_length=MAX_STOPS)
