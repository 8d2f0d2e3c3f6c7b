"""The body of PUT /v1/adapters/{name}/gate. Imports no torch."""

from typing import Annotated, ClassVar

from pydantic import Field

from swaplora_server.http.evaluations.wire import MAX_STOPS, MAX_TOKENS, TaskText
from swaplora_server.http.transport.models import ClosedModel

Share = Annotated[float, Field(ge=0, le=1)]


class MustKeepBody(ClosedModel):
    """A task that a new version may get worse at by no more than `max_drop`, beside the current one."""

    task: TaskText
    max_drop: Share


class GateBody(ClosedModel):
    """What a new version must reach, and what it must keep."""

    has_content: ClassVar[bool] = True

    task: TaskText
    min_score: Share
    must_keep: MustKeepBody | None = None
    max_tokens: int = Field(256, ge=1, le=MAX_TOKENS)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field([], max_length=MAX_STOPS)
