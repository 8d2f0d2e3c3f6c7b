"""From pieces to OpenAI's objects: what completions and chat completions have in common."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swaplora_adapters.store.records import VersionRecord
from swaplora_server.engine.request import FinishReason
from swaplora_server.http.logprobs import prompt_logprobs
from swaplora_server.http.sse import DONE, EventStreamResponse, event, until_disconnect
from swaplora_server.http.wire import GenerationBody
from swaplora_server.service.detokenize import TextToken
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generation import Generation, Piece
from swaplora_server.service.metrics.records import Outcome


@dataclass(slots=True)
class Choice:
    """One choice of an answer that is not streamed, as it grows."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[TextToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    ending: TextToken | None = None  # with logprobs, which ended it and is not in its text
    stopped_by: str | None = None  # the stop string, if it was one
    logprobs: list[float] = field(default_factory=list)  # of all that was generated, where these are wanted

    @property
    def mean_logprob(self) -> float:
        """How likely it is, each token counted alike."""
        return sum(self.logprobs) / max(1, len(self.logprobs))

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        if piece.token_id is not None:
            self.token_ids.append(piece.token_id)
        self.tokens += piece.tokens
        self.ending, self.stopped_by = piece.ending, piece.stopped_by
        if piece.logprob is not None:
            self.logprobs.append(piece.logprob)


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How one route writes its objects."""

    id_prefix: str
    object: str
    chunk_object: str
    choice: Callable[[Choice], dict[str, Any]]
    chunks: Callable[[Piece], list[dict[str, Any]]]  # a piece as the choices of zero or more chunks
    opening: Callable[[int], dict[str, Any]] | None  # the choice of the chunk before the first piece
    one_prompt: bool = False  # what is said of the prompt stands beside the choices, not in each


def check_prompt_logprobs(body: GenerationBody) -> None:
    """Raise RequestError where they are asked for and have no place."""
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError(
            "invalid_request", "prompt_logprobs are not in a stream: leave stream out", "prompt_logprobs"
        )


async def answer(
    request: Request, body: GenerationBody, generation: Generation, form: AnswerFormat, num_generated: int | None = None
) -> Response:
    """The whole answer or a stream of it. The generation is aborted when the client goes before it has ended.

    Of `num_generated` choices for each prompt the n likeliest are given.
    """
    envelope = {
        "id": f"{form.id_prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": generation.fingerprint,
        **served_tier(body),
    }
    headers = adapter_headers(generation.records)
    if body.stream:
        stream = _Stream(body, generation, form, {**envelope, "object": form.chunk_object})
        return EventStreamResponse(stream.events(), headers, at_end=generation.abort)
    try:
        choices = await until_disconnect(request.receive, collected(generation))
    finally:
        generation.abort()

    def written() -> Response:
        told = [
            {**_whole_choice(body, generation, form, choice), "index": index}
            for index, choice in enumerate(_likeliest(choices, num_generated or body.n, body.n))
        ]
        of_prompt = _of_prompt(body, generation, 0) if form.one_prompt else {}
        content = {**envelope, "object": form.object, "choices": told, "usage": usage(generation), **of_prompt}
        return JSONResponse(content, headers=headers)

    return await asyncio.to_thread(written) if generation.has_long_prompts else written()


def served_tier(body: GenerationBody) -> dict[str, str]:
    """What a client is told that asked for one of OpenAI's tiers: there is one."""
    return {"service_tier": "default"} if (body.model_extra or {}).get("service_tier") else {}


def _likeliest(choices: Sequence[Choice], num_generated: int, n: int) -> list[Choice]:
    """The best n of each prompt's, the likeliest first; all in their order if they are no more."""
    if num_generated == n:
        return list(choices)
    return [
        choice
        for start in range(0, len(choices), num_generated)
        for choice in sorted(choices[start : start + num_generated], key=lambda one: -one.mean_logprob)[:n]
    ]


def usage(generation: Generation) -> dict[str, Any]:
    """Token counts so far, over all choices."""
    generated = sum(generation.num_generated)
    return {
        "prompt_tokens": generation.num_prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": generation.num_prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


async def collected(generation: Generation) -> list[Choice]:
    """All choices, once they have ended. Raises RequestError where that is by an error."""
    choices = [Choice(index) for index in range(generation.num_choices)]
    while generation.outcome is None:
        await generation.arrival()
        for piece in generation.arrived():
            choices[piece.choice].add(piece)
    return choices


def adapter_headers(records: Sequence[VersionRecord]) -> dict[str, str]:
    """Which versions answer; of a sum all, in order."""
    if not records:
        return {}
    return {
        "x-swaplora-adapter": ", ".join(f"{record.name}@{record.version}" for record in records),
        "x-swaplora-digest": ", ".join(record.digest for record in records),
    }


@dataclass(frozen=True, slots=True)
class _Stream:
    """One streamed answer."""

    body: GenerationBody
    generation: Generation
    form: AnswerFormat
    envelope: Mapping[str, Any]  # what each chunk begins with, up to its choices

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events, all at once that have come together; what opens a choice goes with the first of them.

        Raises RequestError behind what came before it.
        """
        opening = "".join(map(event, self._opening()))
        while self.generation.outcome is None:
            await self.generation.arrival()
            arrived, failure = self._arrived()
            if arrived:
                yield f"{opening}{arrived}".encode()
                opening = ""
            if failure is not None:
                raise failure
        yield f"{opening}{''.join(map(event, self._end()))}{DONE}".encode()

    def _opening(self) -> Iterator[dict[str, Any]]:
        if self.form.opening is not None:
            for index in range(self.generation.num_choices):
                yield self._chunk(self.form.opening(index))

    def _arrived(self) -> tuple[str, RequestError | None]:
        events: list[str] = []
        try:
            for piece in self.generation.arrived():
                token_ids = [] if piece.token_id is None else [piece.token_id]
                for choice in self.form.chunks(piece):
                    events.append(event(self._chunk(_with_ids(self.body, choice, token_ids))))
                    token_ids = []
        except RequestError as error:
            return "".join(events), error
        return "".join(events), None

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self.envelope, "choices": [choice]}
        options = self.body.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = usage(self.generation)
        return chunk

    def _end(self) -> Iterator[dict[str, Any]]:
        options = self.body.stream_options
        if options is not None and options.include_usage and self.generation.outcome is Outcome.COMPLETED:
            yield {**self.envelope, "choices": [], "usage": usage(self.generation)}


def _whole_choice(body: GenerationBody, generation: Generation, form: AnswerFormat, choice: Choice) -> dict[str, Any]:
    prompt = {"prompt_token_ids": list(generation.prompt_ids(choice.index))} if body.return_token_ids else {}
    scores = {} if form.one_prompt else _of_prompt(body, generation, choice.index)
    return {**_with_ids(body, form.choice(choice), choice.token_ids), **prompt, **scores}


def _of_prompt(body: GenerationBody, generation: Generation, choice: int) -> dict[str, Any]:
    """The logprobs of the choice's prompt, where they are asked for, as many as are."""
    if body.prompt_logprobs is None:
        return {}
    scores = [replace(one, top=one.top[: body.prompt_logprobs]) for one in generation.prompt_scores(choice)]
    return {"prompt_logprobs": prompt_logprobs(generation.vocabulary, generation.prompt_ids(choice), scores)}


def _with_ids(body: GenerationBody, choice: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
    return {**choice, "token_ids": token_ids} if body.return_token_ids else choice
