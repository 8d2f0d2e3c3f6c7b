"""The body of POST /v1/evaluations. Imports no torch."""

from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from swaplora_server.http.transport.models import BRANCH, ClosedModel

MAX_MODELS = 8
MAX_TOKENS = 4096
MAX_STOPS = 16
_TEXT, _ITEMS = f"{BRANCH}text", f"{BRANCH}items"


def _form(value: object) -> str | None:
    return _TEXT if isinstance(value, str) else _ITEMS if isinstance(value, list) else None


TaskText = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[list[Any], Tag(_ITEMS)],
    Discriminator(_form, "form", "must be JSONL as text, or a list of objects"),
]


class EvaluationBody(ClosedModel):
    """A task, and who is to be asked."""

    has_content: ClassVar[bool] = True

    task: TaskText
    models: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(min_length=1, max_length=MAX_MODELS)
    max_tokens: int = Field(256, ge=1, le=MAX_TOKENS)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field([], max_length=MAX_STOPS)
