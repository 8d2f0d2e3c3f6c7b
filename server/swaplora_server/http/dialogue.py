"""What OpenAI's responses and Anthropic's messages have in common: a conversation in, one answer out, named events."""

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swaplora_server.http.answers import Choice, adapter_headers, collected
from swaplora_server.http.sse import EventStreamResponse, named_event, until_disconnect
from swaplora_server.http.tasks import task_of
from swaplora_server.http.transport.models import BRANCH, WireModel
from swaplora_server.http.wire import GenerationBody
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generation import Encode, Generation, Piece, generate
from swaplora_server.service.service import Service

Turn = Mapping[str, str]  # role and content, as a chat template reads them
Event = tuple[str, dict[str, Any]]  # its name, and its object
_TEXT, _ITEMS = f"{BRANCH}text", f"{BRANCH}items"


def _form(value: object) -> str | None:
    return _TEXT if isinstance(value, str) else _ITEMS if isinstance(value, list) else None


class Block(WireModel):
    """A part of what is said; those that are not text are refused by their type."""

    type: Annotated[str, Field(max_length=64)]
    text: str | None = None


Said = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[list[Block], Field(max_length=4096, fail_fast=True), Tag(_ITEMS)],
    Discriminator(_form, "form", "must be a string, or a list of blocks of text"),
]


def text_of(said: str | Sequence[Block], path: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """What is said at `path`. Raises RequestError for a block that is not text."""
    if isinstance(said, str):
        return said
    for number, block in enumerate(said):
        if block.type not in kinds or block.text is None:
            words = f"blocks of type {block.type!r} are not read here, only {' and '.join(kinds)}"
            raise RequestError("unsupported_field", f"{path}[{number}].type: {words}", f"{path}[{number}].type")
    return "".join(block.text or "" for block in said)


def check_one_answer(body: GenerationBody) -> None:
    """Raise RequestError for what chats and completions have and one plain answer has no place for."""
    for name, value in (("n", 1), ("prompt_logprobs", None), ("return_token_ids", False)):
        if getattr(body, name) != value:
            raise RequestError("unsupported_field", f"{name} is not supported here: leave it out", name)


def prompt_of(service: Service, body: GenerationBody, turns: Sequence[Turn], *, is_begun: bool = False) -> Encode:
    """What makes the prompt; `is_begun`: the last turn is the beginning of the answer."""
    return partial(
        service.render_chat,
        turns,
        {},
        body.prompt_param,
        add_generation_prompt=not is_begun,
        continue_final_message=is_begun,
        add_special_tokens=False,
    )


@dataclass(frozen=True, slots=True)
class DialogueFormat:
    """How one API writes its one answer."""

    whole: Callable[[Generation, Choice], dict[str, Any]]
    opening: Callable[[Generation], Iterator[Event]]  # before the first piece
    delta: Callable[[str], Event]  # of text
    ending: Callable[[Generation, Choice], Iterator[Event]]  # after the last piece
    failure: Callable[[RequestError], Iterator[Event]]  # behind what was sent already


async def answer_dialogue(
    request: Request,
    service: Service,
    body: GenerationBody,
    encode: Encode,
    max_tokens: int | None,
    form: DialogueFormat,
) -> Response:
    """One answer, whole or as a stream of named events. It is aborted when the client goes before it has ended."""
    service.check_serving()
    task = task_of(request, body, encode, num_prompts=1, max_tokens=max_tokens)
    generation = await until_disconnect(request.receive, generate(service, task))
    headers = adapter_headers(generation.records)
    if body.stream:
        return EventStreamResponse(_events(generation, form), headers, at_end=generation.abort)
    try:
        (choice,) = await until_disconnect(request.receive, collected(generation))
    finally:
        generation.abort()
    return JSONResponse(form.whole(generation, choice), headers=headers)


async def _events(generation: Generation, form: DialogueFormat) -> AsyncGenerator[bytes]:
    """Raises RequestError while nothing was sent: it has a status then, and is an event after that."""
    choice, has_begun = Choice(0), False
    while generation.outcome is None:
        await generation.arrival()
        pieces, failure = _arrived(generation)
        if failure is not None and not has_begun and not pieces:
            raise failure
        if not pieces and failure is None:
            continue
        events = [] if has_begun else list(form.opening(generation))
        has_begun = True
        for piece in pieces:
            choice.add(piece)
            events += [form.delta(piece.text)] if piece.text else []
        if failure is not None:
            events += form.failure(failure)
        elif choice.finish_reason is not None:
            events += form.ending(generation, choice)
        yield "".join(named_event(name, data) for name, data in events).encode()


def _arrived(generation: Generation) -> tuple[list[Piece], RequestError | None]:
    pieces: list[Piece] = []
    try:
        pieces.extend(generation.arrived())
    except RequestError as error:
        return pieces, error
    return pieces, None
