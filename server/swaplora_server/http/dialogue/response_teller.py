"""One answer as OpenAI's response: items of output, and the events by which they come."""

import itertools
import time
import uuid
from collections.abc import Iterator
from typing import Any

from swaplora_server.http.answers import served_tier
from swaplora_server.http.dialogue.answers import Answer, AnswerBlock, Event, Teller
from swaplora_server.http.dialogue.response_wire import ResponseBody
from swaplora_server.http.errors import error_body
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generation import Generation


class ResponseTeller(Teller):
    """Of one response."""

    def __init__(self, body: ResponseBody) -> None:
        self._body = body
        self._created_at = int(time.time())
        self._id = f"resp_{uuid.uuid4().hex}"
        self._numbers = itertools.count()

    def whole(self, generation: Generation, answer: Answer) -> dict[str, Any]:
        """All of it as one object."""
        return self._object(
            _status(is_whole=not answer.is_cut),
            output=[_item(block, _status(is_whole=answer.is_whole(block))) for block in answer.blocks],
            incomplete_details={"reason": "max_output_tokens"} if answer.is_cut else None,
            usage=_usage(generation, answer),
        )

    def opening(self, _generation: Generation) -> Iterator[Event]:
        """The response, with nothing in it."""
        yield self._event("response.created", response=self._object("in_progress"))
        yield self._event("response.in_progress", response=self._object("in_progress"))

    def begun(self, block: AnswerBlock) -> Iterator[Event]:
        """An item, and the one part of a text."""
        item = _item(block, "in_progress") | ({} if block.call else {"content": []})
        yield self._event("response.output_item.added", output_index=block.number, item=item)
        if block.call is None:
            yield self._event("response.content_part.added", **_place(block), part=_part(block, ""))

    def grown(self, block: AnswerBlock, text: str) -> Iterator[Event]:
        """Its text or its arguments go on."""
        if block.is_thought:
            yield self._event("response.reasoning_text.delta", **_place(block), delta=text)
        elif block.call is None:
            yield self._event("response.output_text.delta", **_place(block), delta=text, logprobs=[])
        else:
            place = {"item_id": _id(block), "output_index": block.number}
            yield self._event("response.function_call_arguments.delta", **place, delta=text)

    def ended(self, block: AnswerBlock, *, is_whole: bool = True) -> Iterator[Event]:
        """All of its text or arguments, then all of it."""
        if block.call is None:
            done: dict[str, Any] = {"text": block.text} | ({} if block.is_thought else {"logprobs": []})
            yield self._event(
                f"response.{'reasoning' if block.is_thought else 'output'}_text.done", **_place(block), **done
            )
            yield self._event("response.content_part.done", **_place(block), part=_part(block, block.text))
        else:
            told = {"item_id": _id(block), "arguments": block.text}
            yield self._event("response.function_call_arguments.done", output_index=block.number, **told)
        item = _item(block, _status(is_whole=is_whole))
        yield self._event("response.output_item.done", output_index=block.number, item=item)

    def ending(self, generation: Generation, answer: Answer) -> Iterator[Event]:
        """The whole response."""
        whole = self.whole(generation, answer)
        yield self._event(f"response.{whole['status']}", response=whole)

    def failure(self, error: RequestError) -> Iterator[Event]:
        """Our error as an event."""
        told = error_body(error.code, error.message, error.param)["error"]
        yield self._event("error", code=told["code"], message=told["message"], param=told["param"])

    def _event(self, name: str, /, **fields: Any) -> Event:
        return name, {"type": name, "sequence_number": next(self._numbers), **fields}

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
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.told_format()},
            "tool_choice": _told_choice(body),
            "tools": [_told_tool(tool) for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            **served_tier(body),
            **fields,
        }


def _status(*, is_whole: bool) -> str:
    return "completed" if is_whole else "incomplete"


def _id(block: AnswerBlock) -> str:
    return f"{'fc' if block.call else 'rs' if block.is_thought else 'msg'}_{block.key}"


def _place(block: AnswerBlock) -> dict[str, Any]:
    return {"item_id": _id(block), "output_index": block.number, "content_index": 0}


def _item(block: AnswerBlock, status: str) -> dict[str, Any]:
    if block.is_thought:
        own: dict[str, Any] = {"id": _id(block), "type": "reasoning", "status": status, "summary": []}
        return {**own, "content": [_part(block, block.text)]}
    if block.call is None:
        own = {"id": _id(block), "type": "message", "role": "assistant", "status": status}
        return {**own, "content": [_part(block, block.text)]}
    call = {"call_id": block.call.call_id, "name": block.call.name, "arguments": block.text}
    return {"id": _id(block), "type": "function_call", "status": status, **call}


def _part(block: AnswerBlock, text: str) -> dict[str, Any]:
    if block.is_thought:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": []}


def _told_choice(body: ResponseBody) -> Any:
    choice = body.tool_choice
    return choice if isinstance(choice, str) else {"type": "function", "name": choice.name} if choice else "auto"


def _told_tool(tool: Any) -> dict[str, Any]:
    own = {"name": tool.name, "description": tool.description, "parameters": tool.parameters and tool.parameters.value}
    return {"type": "function", **own, "strict": bool(tool.strict)}


def _usage(generation: Generation, answer: Answer) -> dict[str, Any]:
    generated = sum(generation.num_generated)
    return {
        "input_tokens": generation.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": generation.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": answer.num_thought_tokens},
        "total_tokens": generation.num_prompt_tokens + generated,
    }
