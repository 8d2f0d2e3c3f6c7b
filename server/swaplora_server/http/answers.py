"""From pieces to OpenAI's objects: what completions and chat completions have in common."""

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swaplora_server.engine.request import FinishReason
from swaplora_server.http.sse import DONE, EventStreamResponse, to_json, until_disconnect
from swaplora_server.http.wire import GenerationBody
from swaplora_server.service.detokenize import TextToken
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generation import Admission, Generation, GenerationError, Piece
from swaplora_server.service.metrics import Outcome


@dataclass(slots=True)
class Choice:
    """One choice of an answer that is not streamed, as it grows."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[TextToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        if piece.token_id is not None:
            self.token_ids.append(piece.token_id)
        self.tokens += piece.tokens


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How one route writes its objects."""

    id_prefix: str
    object: str
    chunk_object: str
    choice: Callable[[Choice], dict[str, Any]]
    # JSON without its closing brace: a piece as the choices of zero or more chunks, and the one before the first piece
    chunks: Callable[[Piece], list[str]]
    opening: Callable[[int], str] | None


async def answer(request: Request, body: GenerationBody, admission: Admission, form: AnswerFormat) -> Response:
    """The whole answer or a stream of it. The generation is aborted when the client goes before it has ended."""
    envelope = {"id": f"{form.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    if body.stream:
        head = to_json({**envelope, "object": form.chunk_object}).removesuffix("}")
        stream = _Stream(body, admission.generation, form, f'data: {head},"choices":[')
        return EventStreamResponse(stream.events(), admission.headers, at_end=admission.generation.abort)
    try:
        choices = await until_disconnect(request.receive, _collect(admission.generation))
    except GenerationError as error:
        raise RequestError(error.code, str(error)) from error
    finally:
        admission.generation.abort()
    content = {
        **envelope,
        "object": form.object,
        "choices": [_whole_choice(body, admission.generation, form, choice) for choice in choices],
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
    while generation.outcome is None:
        await generation.arrival()
        for piece in generation.arrived():
            choices[piece.choice].add(piece)
    return choices


@dataclass(frozen=True, slots=True)
class _Stream:
    """One streamed answer. A chunk is written as text around what changes: it is made once a token."""

    body: GenerationBody
    generation: Generation
    form: AnswerFormat
    head: str  # what each chunk begins with, up to its choices

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events, all at once that have come together; what opens a choice goes with the first of them.

        Raises RequestError behind what came before it.
        """
        opening = self._opening()
        while self.generation.outcome is None:
            await self.generation.arrival()
            arrived, failure = self._arrived()
            if arrived:
                yield f"{opening}{arrived}".encode()
                opening = ""
            if failure is not None:
                raise RequestError(failure.code, str(failure)) from failure
        yield f"{opening}{self._end()}{DONE}".encode()

    def _opening(self) -> str:
        if self.form.opening is None:
            return ""
        return "".join(map(self._chunk, map(self.form.opening, range(self.generation.num_choices))))

    def _arrived(self) -> tuple[str, GenerationError | None]:
        chunks: list[str] = []
        try:
            for piece in self.generation.arrived():
                token_ids = [] if piece.token_id is None else [piece.token_id]
                for choice in self.form.chunks(piece):
                    chunks.append(self._chunk(choice, token_ids))
                    token_ids = []
        except GenerationError as error:
            return "".join(chunks), error
        return "".join(chunks), None

    def _chunk(self, choice: str, token_ids: list[int] | None = None) -> str:
        options = self.body.stream_options
        is_counting = options is not None and options.continuous_usage_stats
        counts = f',"usage":{to_json(usage(self.generation))}' if is_counting else ""
        ids = f',"token_ids":{token_ids}' if self.body.return_token_ids and token_ids is not None else ""
        return f"{self.head}{choice}{ids}}}]{counts}}}\n\n"

    def _end(self) -> str:
        options = self.body.stream_options
        is_wanted = options is not None and options.include_usage and self.generation.outcome is Outcome.COMPLETED
        return f'{self.head}],"usage":{to_json(usage(self.generation))}}}\n\n' if is_wanted else ""


def _whole_choice(body: GenerationBody, generation: Generation, form: AnswerFormat, choice: Choice) -> dict[str, Any]:
    prompt = {"prompt_token_ids": list(generation.prompt_ids(choice.index))} if body.return_token_ids else {}
    return {**_with_ids(body, form.choice(choice), choice.token_ids), **prompt}


def _with_ids(body: GenerationBody, choice: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
    return {**choice, "token_ids": token_ids} if body.return_token_ids else choice
