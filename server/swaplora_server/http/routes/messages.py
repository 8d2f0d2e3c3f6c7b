"""POST /v1/messages: Anthropic's way to ask for one answer, its errors in Anthropic's shape."""

import json
import uuid
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

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
from swaplora_server.http.errors import error_body, errors_told_by
from swaplora_server.http.refusals import ANTHROPIC, refuse_unsupported
from swaplora_server.http.routes.models import check_model
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.transport.models import WireModel
from swaplora_server.http.wire import MAX_STOP_CHARACTERS, MAX_STOPS, MAX_USER_CHARACTERS, GenerationBody, MaxTokens
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generation import Generation

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _error(status: int, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": _TYPES.get(status, "api_error"), "message": message}}


def _as_anthropic(refused: JSONResponse) -> JSONResponse:
    """Our error as Anthropic tells it."""
    kept = {name: value for name, value in refused.headers.items() if name == "retry-after"}
    message = json.loads(bytes(refused.body))["error"]["message"]
    return JSONResponse(_error(refused.status_code, message), refused.status_code, headers=kept)


router = APIRouter(route_class=errors_told_by(_as_anthropic))


class Metadata(WireModel):
    user_id: Annotated[str, Field(max_length=MAX_USER_CHARACTERS)] | None = None


class AnthropicMessage(WireModel):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Said


class CountBody(GenerationBody):
    """POST /v1/messages/count_tokens, and what it has in common with the answer to it."""

    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    system: Said | None = None

    def prompt_param(self, _number: int) -> str:
        """The messages make the one prompt."""
        return "messages"


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: MaxTokens
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    metadata: Metadata | None = None


@router.post("/v1/messages", openapi_extra=body_schema(MessagesBody))
@needs(KeyScope.GENERATE)
async def create_message(
    request: Request, service: Serving, body: Annotated[MessagesBody, Depends(json_body(MessagesBody))]
) -> Response:
    """Answer the conversation."""
    _check(body)
    named = body.model_copy(
        update={
            "stop": [*body.stops, *(body.stop_sequences or ())] or None,
            "user": body.user or (body.metadata.user_id if body.metadata else None),
        }
    )
    if "" in named.stops or sum(map(len, named.stops)) > MAX_STOP_CHARACTERS:
        message = f"stop_sequences: none may be empty, and all may have {MAX_STOP_CHARACTERS} characters together"
        raise RequestError("invalid_request", message, "stop_sequences")
    turns = list(_turns(body))
    encode = prompt_of(service, body, turns, is_begun=turns[-1]["role"] == "assistant")
    return await answer_dialogue(request, service, named, encode, body.max_tokens, _Told(body).form())


@router.post("/v1/messages/count_tokens", openapi_extra=body_schema(CountBody))
@needs(KeyScope.GENERATE)
async def count_tokens(
    request: Request, service: Serving, body: Annotated[CountBody, Depends(json_body(CountBody))]
) -> dict[str, int]:
    """How many tokens the conversation is."""
    _check(body)
    service.check_serving()
    check_model(service, body.model)
    turns = list(_turns(body))
    encode = prompt_of(service, body, turns, is_begun=turns[-1]["role"] == "assistant")
    (token_ids,) = await until_disconnect(request.receive, encode())
    return {"input_tokens": len(token_ids)}


def _check(body: CountBody) -> None:
    refuse_unsupported(body, ANTHROPIC)
    check_one_answer(body)


def _turns(body: CountBody) -> Iterator[Turn]:
    if body.system:
        yield {"role": "system", "content": text_of(body.system, "system")}
    for number, message in enumerate(body.messages):
        yield {"role": message.role, "content": text_of(message.content, f"messages[{number}].content")}


class _Told:
    """One answer, as it is told."""

    def __init__(self, body: MessagesBody) -> None:
        self._model = body.model
        self._id = f"msg_{uuid.uuid4().hex}"

    def form(self) -> DialogueFormat:
        """As it is written."""
        return DialogueFormat(self._whole, self._opening, self._delta, self._ending, self._failure)

    def _whole(self, generation: Generation, choice: Choice) -> dict[str, Any]:
        content = [{"type": "text", "text": choice.text}]
        return self._message(content, _usage(generation), **_stop(choice))

    def _opening(self, generation: Generation) -> Iterator[Event]:
        usage = {**_usage(generation), "output_tokens": 0}
        message = self._message([], usage, stop_reason=None, stop_sequence=None)
        yield "message_start", {"type": "message_start", "message": message}
        block = {"type": "text", "text": ""}
        yield "content_block_start", {"type": "content_block_start", "index": 0, "content_block": block}

    def _delta(self, text: str) -> Event:
        delta = {"type": "text_delta", "text": text}
        return "content_block_delta", {"type": "content_block_delta", "index": 0, "delta": delta}

    def _ending(self, generation: Generation, choice: Choice) -> Iterator[Event]:
        yield "content_block_stop", {"type": "content_block_stop", "index": 0}
        usage = {"output_tokens": sum(generation.num_generated)}
        yield "message_delta", {"type": "message_delta", "delta": _stop(choice), "usage": usage}
        yield "message_stop", {"type": "message_stop"}

    def _failure(self, error: RequestError) -> Iterator[Event]:
        yield "error", _error(500, str(error_body(error.code, error.message)["error"]["message"]))

    def _message(self, content: list[dict[str, Any]], usage: dict[str, int], **stop: str | None) -> dict[str, Any]:
        own = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return {**own, "content": content, **stop, "usage": usage}


def _stop(choice: Choice) -> dict[str, str | None]:
    if choice.finish_reason is FinishReason.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    return {"stop_reason": "stop_sequence" if choice.stopped_by else "end_turn", "stop_sequence": choice.stopped_by}


def _usage(generation: Generation) -> dict[str, int]:
    """Tokens that were in the cache are counted apart, as Anthropic counts them."""
    cached = generation.num_cached_tokens
    return {
        "input_tokens": generation.num_prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": sum(generation.num_generated),
    }
