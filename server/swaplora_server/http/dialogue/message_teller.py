"""One answer as Anthropic's message: blocks of content, and the events by which they come."""

import uuid
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from swaplora_server.http.dialogue.answers import Answer, AnswerBlock, Event, Teller
from swaplora_server.http.errors import error_body
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generation import Generation
from swaplora_server.service.tools.reader import Called

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    """An error as Anthropic tells it."""
    return {"type": "error", "error": {"type": _TYPES.get(status, "api_error"), "message": message}}


class MessageTeller(Teller):
    """Of one message."""

    def __init__(self, model: str, *, tells_thoughts: bool) -> None:
        self._model = model
        self.tells_thoughts = tells_thoughts
        self._id = f"msg_{uuid.uuid4().hex}"

    def whole(self, generation: Generation, answer: Answer) -> dict[str, Any]:
        """All of it as one object."""
        return self._message([_content(block) for block in answer.blocks], _usage(generation), **_stop(answer))

    def opening(self, generation: Generation) -> Iterator[Event]:
        """The message, with nothing in it."""
        usage = {**_usage(generation), "output_tokens": 0}
        message = self._message([], usage, stop_reason=None, stop_sequence=None)
        yield _event("message_start", message=message)

    def begun(self, block: AnswerBlock) -> Iterator[Event]:
        """A block of content; the input of a call comes as the text that it is in JSON."""
        empty = {**_call(block.call), "input": {}} if block.call else _text(block, "")
        yield _event("content_block_start", index=block.number, content_block=empty)

    def grown(self, block: AnswerBlock, text: str) -> Iterator[Event]:
        """Its text or its input goes on."""
        own = ("thinking_delta", "thinking") if block.is_thought else ("text_delta", "text")
        kind, name = ("input_json_delta", "partial_json") if block.call else own
        yield _event("content_block_delta", index=block.number, delta={"type": kind, name: text})

    def ended(self, block: AnswerBlock, *, is_whole: bool = True) -> Iterator[Event]:
        """Said of whole ones and of others alike."""
        yield _event("content_block_stop", index=block.number)

    def ending(self, generation: Generation, answer: Answer) -> Iterator[Event]:
        """Why it ended, and what it took."""
        usage = {"output_tokens": sum(generation.num_generated)}
        yield _event("message_delta", delta=_stop(answer), usage=usage)
        yield _event("message_stop")

    def failure(self, error: RequestError) -> Iterator[Event]:
        """Our error as an event."""
        yield "error", anthropic_error(500, str(error_body(error.code, error.message)["error"]["message"]))

    def _message(self, content: list[dict[str, Any]], usage: dict[str, int], **stop: str | None) -> dict[str, Any]:
        own = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return {**own, "content": content, **stop, "usage": usage}


def _event(name: str, /, **fields: Any) -> Event:
    return name, {"type": name, **fields}


def _content(block: AnswerBlock) -> dict[str, Any]:
    if block.call is None:
        return _text(block, block.text)
    return {**_call(block.call), "input": _input(block.text)}


def _text(block: AnswerBlock, text: str) -> dict[str, Any]:
    if block.is_thought:
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _input(text: str) -> dict[str, Any]:
    """Arguments as an object: of those cut off as much as is there; of what a model wrote that is no JSON, the text."""
    try:
        value = from_json(text or "{}", allow_partial=True)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": text}


def _call(call: Called) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{call.call_id.removeprefix('call_')}", "name": call.name}


def _stop(answer: Answer) -> dict[str, str | None]:
    if answer.is_cut:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if answer.stopped_by:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stopped_by}
    return {"stop_reason": "tool_use" if answer.has_calls else "end_turn", "stop_sequence": None}


def _usage(generation: Generation) -> dict[str, int]:
    """Tokens that were in the cache are counted apart, as Anthropic counts them."""
    cached = generation.num_cached_tokens
    return {
        "input_tokens": generation.num_prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": sum(generation.num_generated),
    }
