"""POST /v1/responses: OpenAI's newer way to ask for one answer. Nothing is kept: a request brings all that was said."""

import itertools
import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from swaplora_server.access.caller import KeyScope
from swaplora_server.engine.request import FinishReason
from swaplora_server.http.answers import Choice
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.dialogue import (
    DialogueFormat,
    Event,
    Said,
    Turn,
    answer_dialogue,
    check_one_answer,
    prompt_of,
    text_of,
)
from swaplora_server.http.errors import error_body
from swaplora_server.http.refusals import RESPONSE, refuse_unsupported
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.transport.models import BRANCH, WireModel
from swaplora_server.http.wire import GenerationBody, MaxTokens
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generation import Generation

router = APIRouter()
_TEXT, _ITEMS = f"{BRANCH}text", f"{BRANCH}items"
_PARTS = ("input_text", "output_text", "text")
_ROLES = {"developer": "system"}  # the newer name of the same role


class Item(WireModel):
    """One of what was said; those that are not messages are refused by their type."""

    type: Annotated[str, Field(max_length=64)] = "message"
    role: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    content: Said | None = None


def _form(value: object) -> str | None:
    return _TEXT if isinstance(value, str) else _ITEMS if isinstance(value, list) else None


Input = Annotated[
    Annotated[str, Tag(_TEXT)]
    | Annotated[list[Item], Field(min_length=1, max_length=4096, fail_fast=True), Tag(_ITEMS)],
    Discriminator(_form, "form", "must be a text, or a list of messages"),
]


class ResponseBody(GenerationBody):
    """POST /v1/responses."""

    input: Input
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    def prompt_param(self, _number: int) -> str:
        """The one prompt is made of it."""
        return "input"

    @property
    def length_param(self) -> str:
        """As OpenAI calls it here."""
        return "max_output_tokens"


@router.post("/v1/responses", openapi_extra=body_schema(ResponseBody))
@needs(KeyScope.GENERATE)
async def respond(
    request: Request, service: Serving, body: Annotated[ResponseBody, Depends(json_body(ResponseBody))]
) -> Response:
    """Answer what was said so far."""
    refuse_unsupported(body, RESPONSE)
    check_one_answer(body)
    encode = prompt_of(service, body, list(_turns(body)))
    return await answer_dialogue(request, service, body, encode, body.max_output_tokens, _Told(body).form())


def _turns(body: ResponseBody) -> Iterator[Turn]:
    if body.instructions:
        yield {"role": "system", "content": body.instructions}
    if isinstance(body.input, str):
        yield {"role": "user", "content": body.input}
        return
    for number, item in enumerate(body.input):
        path = f"input[{number}]"
        if item.type != "message":
            message = f"{path}.type: items of type {item.type[:64]!r} are not supported yet: send messages"
            raise RequestError("unsupported_field", message, f"{path}.type")
        if item.role is None or item.content is None:
            missing = "role" if item.role is None else "content"
            raise RequestError("invalid_request", f"{path}.{missing} is needed", f"{path}.{missing}")
        said = text_of(item.content, f"{path}.content", _PARTS)
        yield {"role": _ROLES.get(item.role, item.role), "content": said}


class _Told:
    """One answer, as it is told."""

    def __init__(self, body: ResponseBody) -> None:
        self._body = body
        self._created_at = int(time.time())
        self._id = f"resp_{uuid.uuid4().hex}"
        self._place = {"item_id": f"msg_{uuid.uuid4().hex}", "output_index": 0, "content_index": 0}
        self._numbers = itertools.count()

    def form(self) -> DialogueFormat:
        """As it is written."""
        return DialogueFormat(self._whole, self._opening, self._delta, self._ending, self._failure)

    def _whole(self, generation: Generation, choice: Choice) -> dict[str, Any]:
        is_cut = choice.finish_reason is FinishReason.LENGTH
        return self._object(
            "incomplete" if is_cut else "completed",
            output=[self._message("incomplete" if is_cut else "completed", [_part(choice.text)])],
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            usage=_usage(generation),
        )

    def _opening(self, _generation: Generation) -> Iterator[Event]:
        yield self._event("response.created", response=self._object("in_progress"))
        yield self._event("response.in_progress", response=self._object("in_progress"))
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._event("response.content_part.added", **self._place, part=_part(""))

    def _delta(self, text: str) -> Event:
        return self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def _ending(self, generation: Generation, choice: Choice) -> Iterator[Event]:
        whole = self._whole(generation, choice)
        yield self._event("response.output_text.done", **self._place, text=choice.text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=_part(choice.text))
        yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield self._event(f"response.{whole['status']}", response=whole)

    def _failure(self, error: RequestError) -> Iterator[Event]:
        told = error_body(error.code, error.message, error.param)["error"]
        yield self._event("error", code=told["code"], message=told["message"], param=told["param"])

    def _event(self, name: str, **fields: Any) -> Event:
        return name, {"type": name, "sequence_number": next(self._numbers), **fields}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._place["item_id"],
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _object(self, status: str, **fields: Any) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            **fields,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _usage(generation: Generation) -> dict[str, Any]:
    generated = sum(generation.num_generated)
    return {
        "input_tokens": generation.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": generation.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": generation.num_prompt_tokens + generated,
    }
