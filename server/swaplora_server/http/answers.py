"""From pieces to OpenAI's objects: what completions and chat completions have in common."""

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swaplora_server.engine.request import FinishReason, Logprobs
from swaplora_server.http.errors import ApiError, error_body
from swaplora_server.http.generation import Admission, Generation, GenerationError, Piece
from swaplora_server.http.sse import DONE, EventStreamResponse, event, until_disconnect
from swaplora_server.http.wire import GenerationBody


@dataclass(slots=True)
class Choice:
    """One choice of an answer that is not streamed, as it grows."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, Logprobs]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        if piece.token_id is not None:
            self.token_ids.append(piece.token_id)
            if piece.logprobs is not None:
                self.logprobs.append((piece.token_id, piece.logprobs))


@dataclass(frozen=True, slots=True)
class Shape:
    """How one route writes its objects."""

    id_prefix: str
    object: str
    chunk_object: str
    choice: Callable[[Choice], dict[str, Any]]
    chunks: Callable[[Piece], list[dict[str, Any]]]  # a piece as the choices of zero or more chunks
    opening: Callable[[int], dict[str, Any]] | None  # the choice of a chunk that comes before a choice's first piece


async def answer(request: Request, body: GenerationBody, admission: Admission, shape: Shape) -> Response:
    """The whole answer or a stream of it. The generation is aborted when the client goes before it has ended."""
    envelope = {"id": f"{shape.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    if body.stream:
        events = _stream(body, admission.generation, shape, envelope)
        return EventStreamResponse(events, admission.headers, at_end=admission.generation.abort)
    try:
        choices = await until_disconnect(request.receive, _collect(admission.generation))
    except GenerationError as error:
        raise ApiError(error.code, str(error)) from error
    finally:
        admission.generation.abort()
    content = {
        **envelope,
        "object": shape.object,
        "choices": [_whole_choice(body, admission.generation, shape, choice) for choice in choices],
        "usage": usage(admission.generation),
    }
    return JSONResponse(content, headers=admission.headers)


def usage(generation: Generation) -> dict[str, Any]:
    """Token counts so far, over all choices."""
    generated = sum(generation.num_generated)
    return {
        "prompt_tokens": generation.num_prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": generation.num_prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


async def _collect(generation: Generation) -> list[Choice]:
    choices = [Choice(index) for index in range(generation.num_choices)]
    async for piece in generation.pieces():
        choices[piece.index].add(piece)
    return choices


async def _stream(
    body: GenerationBody, generation: Generation, shape: Shape, envelope: dict[str, Any]
) -> AsyncGenerator[bytes]:
    options = body.stream_options
    head = {**envelope, "object": shape.chunk_object}
    pieces = generation.pieces()

    def chunk(choice: dict[str, Any]) -> bytes:
        extra = {"usage": usage(generation)} if options and options.continuous_usage_stats else {}
        return event({**head, "choices": [choice], **extra})

    try:
        if shape.opening is not None:
            for index in range(generation.num_choices):
                yield chunk(shape.opening(index))
        async for piece in pieces:
            token_ids = [] if piece.token_id is None else [piece.token_id]
            for choice in shape.chunks(piece):
                yield chunk(_with_ids(body, choice, token_ids))
                token_ids = []
        if options and options.include_usage:
            yield event({**head, "choices": [], "usage": usage(generation)})
    except GenerationError as error:
        yield event(error_body(error.code, str(error)))
    finally:
        await pieces.aclose()
    yield DONE


def _whole_choice(body: GenerationBody, generation: Generation, shape: Shape, choice: Choice) -> dict[str, Any]:
    prompt = {"prompt_token_ids": list(generation.prompt_ids(choice.index))} if body.return_token_ids else {}
    return {**_with_ids(body, shape.choice(choice), choice.token_ids), **prompt}


def _with_ids(body: GenerationBody, choice: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
    return {**choice, "token_ids": token_ids} if body.return_token_ids else choice
