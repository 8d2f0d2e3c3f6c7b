"""One answer in blocks of text and calls, whole or as a stream of named events."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swaplora_server.engine.request import FinishReason
from swaplora_server.http.answers import adapter_headers
from swaplora_server.http.sse import EventStreamResponse, named_event, until_disconnect
from swaplora_server.http.tasks import task_of
from swaplora_server.http.tools.reading import as_read
from swaplora_server.http.tools.wire import ToolUse
from swaplora_server.http.wire import GenerationBody
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generating.task import Encode
from swaplora_server.service.generation import Generation, Piece, generate
from swaplora_server.service.service import Service
from swaplora_server.service.tools.dialect import TextReader
from swaplora_server.service.tools.reader import Argued, Called, Part, Said, Thought

Event = tuple[str, dict[str, Any]]  # its name, and its object


def check_one_answer(body: GenerationBody) -> None:
    """Raise RequestError for what chats and completions have and one plain answer has no place for."""
    for name, value in (("n", 1), ("prompt_logprobs", None), ("return_token_ids", False)):
        if getattr(body, name) != value:
            raise RequestError("unsupported_field", f"{name} is not supported here: leave it out", name)


def prompt_of(
    service: Service,
    body: GenerationBody,
    turns: Sequence[Mapping[str, Any]],
    use: ToolUse | None,
    variables: Mapping[str, Any],
    *,
    is_begun: bool = False,
) -> Encode:
    """What makes the prompt; the template sees `variables`. `is_begun`: the last turn is how the answer begins."""
    return partial(
        service.render_chat,
        turns,
        variables,
        body.prompt_param,
        add_generation_prompt=not is_begun,
        continue_final_message=is_begun,
        add_special_tokens=False,
        tools=() if use is None else use.tools,
    )


@dataclass(slots=True)
class AnswerBlock:
    """Text, reasoning, or a call and its arguments as text."""

    number: int
    call: Called | None
    is_thought: bool = False
    text: str = ""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def holds(self, part: Part) -> bool:
        """Whether a part that begins no call goes on with it."""
        if isinstance(part, Argued):
            return self.call is not None
        return self.call is None and self.is_thought == isinstance(part, Thought)


class Answer:
    """One answer as it grows."""

    def __init__(self, reader: TextReader, *, tells_thoughts: bool = True) -> None:
        self._reader = reader
        self._tells_thoughts = tells_thoughts
        self._is_thinking = False
        self.num_thought_tokens = 0
        self.blocks: list[AnswerBlock] = []
        self.finish_reason: FinishReason | None = None
        self.stopped_by: str | None = None  # the stop string, where one ended it

    @property
    def is_cut(self) -> bool:
        """Whether it ended where no more tokens were allowed."""
        return self.finish_reason is FinishReason.LENGTH

    @property
    def has_calls(self) -> bool:
        return any(block.call is not None for block in self.blocks)

    def is_whole(self, block: AnswerBlock) -> bool:
        """Whether nothing of it was cut off."""
        return not (self.is_cut and block is self.blocks[-1])

    def read(self, piece: Piece) -> list[Part]:
        """What is known by one more piece, to be added. One that ends has a block, if only an empty one."""
        self.finish_reason, self.stopped_by = piece.finish_reason, piece.stopped_by
        parts = self._reader.push(piece.text)
        parts += [] if self.finish_reason is None else self._reader.flush()
        if parts:
            self._is_thinking = isinstance(parts[-1], Thought)
        self.num_thought_tokens += self._is_thinking and piece.token_id is not None
        told = [part for part in parts if self._tells_thoughts or not isinstance(part, Thought)]
        return told or ([Said("")] if self.finish_reason is not None and not self.blocks else [])

    def add(self, part: Part) -> AnswerBlock:
        """The block that it belongs to: the last, or a new one."""
        if isinstance(part, Called) or not (self.blocks and self.blocks[-1].holds(part)):
            call = part if isinstance(part, Called) else None
            self.blocks.append(AnswerBlock(len(self.blocks), call, is_thought=isinstance(part, Thought)))
        self.blocks[-1].text += text_in(part)
        return self.blocks[-1]


def text_in(part: Part) -> str:
    """What it adds to its block."""
    return "" if isinstance(part, Called) else part.text


class Teller(ABC):
    """How one API writes its one answer."""

    tells_thoughts: bool = True  # whether reasoning is told at all

    @abstractmethod
    def whole(self, generation: Generation, answer: Answer) -> dict[str, Any]:
        """All of it as one object."""

    @abstractmethod
    def opening(self, generation: Generation) -> Iterator[Event]:
        """What stands before the first block."""

    @abstractmethod
    def begun(self, block: AnswerBlock) -> Iterator[Event]:
        """A block that is empty yet."""

    @abstractmethod
    def grown(self, block: AnswerBlock, text: str) -> Iterator[Event]:
        """So much more of a block."""

    @abstractmethod
    def ended(self, block: AnswerBlock, *, is_whole: bool = True) -> Iterator[Event]:
        """A block to which nothing comes any more."""

    @abstractmethod
    def ending(self, generation: Generation, answer: Answer) -> Iterator[Event]:
        """What stands behind the last block."""

    @abstractmethod
    def failure(self, error: RequestError) -> Iterator[Event]:
        """What stands behind all that was sent already."""


async def answer_dialogue(
    request: Request,
    service: Service,
    body: GenerationBody,
    encode: Encode,
    max_tokens: int | None,
    use: ToolUse | None,
    teller: Teller,
) -> Response:
    """One answer, whole or as a stream of named events. It is aborted when the client goes before it has ended."""
    service.check_serving()
    task = task_of(request, service, body, encode, num_prompts=1, max_tokens=max_tokens)
    task, reading = as_read(task, service.dialect, use)
    generation = await until_disconnect(request.receive, generate(service, task))
    headers = adapter_headers(generation.records)
    answer = Answer(reading.new_reader(generation)(), tells_thoughts=teller.tells_thoughts)
    if body.stream:
        return EventStreamResponse(_events(generation, answer, teller), headers, at_end=generation.abort)
    try:
        await until_disconnect(request.receive, _collect(generation, answer))
    finally:
        generation.abort()
    return JSONResponse(teller.whole(generation, answer), headers=headers)


async def _collect(generation: Generation, answer: Answer) -> None:
    while generation.outcome is None:
        await generation.arrival()
        for piece in generation.arrived():
            for part in answer.read(piece):
                answer.add(part)


async def _events(generation: Generation, answer: Answer, teller: Teller) -> AsyncGenerator[bytes]:
    """Raises RequestError while nothing was sent: it has a status then, and is an event after that."""
    has_begun = False
    while generation.outcome is None:
        await generation.arrival()
        pieces, failure = _arrived(generation)
        if failure is not None and not has_begun and not pieces:
            raise failure
        if not pieces and failure is None:
            continue
        events = [] if has_begun else list(teller.opening(generation))
        has_begun = True
        for piece in pieces:
            for part in answer.read(piece):
                events += _told(teller, answer, part)
        if failure is not None:
            events += teller.failure(failure)
        elif answer.finish_reason is not None:
            last = answer.blocks[-1]
            events += teller.ended(last, is_whole=answer.is_whole(last))
            events += teller.ending(generation, answer)
        yield "".join(named_event(name, data) for name, data in events).encode()


def _told(teller: Teller, answer: Answer, part: Part) -> Iterator[Event]:
    last = answer.blocks[-1] if answer.blocks else None
    block = answer.add(part)
    if block is not last:
        if last is not None:
            yield from teller.ended(last)
        yield from teller.begun(block)
    if text := text_in(part):
        yield from teller.grown(block, text)


def _arrived(generation: Generation) -> tuple[list[Piece], RequestError | None]:
    pieces: list[Piece] = []
    try:
        pieces.extend(generation.arrived())
    except RequestError as error:
        return pieces, error
    return pieces, None
