"""A stream's events: the very JSON that the objects have, whatever the text; together when they come together."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request as HttpRequest
from starlette.types import Message

import tiny
from swaplora_server.access.caller import ANYBODY
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.engine.request import FinishReason, Logprobs, TokenEvent
from swaplora_server.http import answers, sse
from swaplora_server.http.routes import chat, completions
from swaplora_server.http.sse import DONE, EventStreamResponse
from swaplora_server.http.tasks import task_of
from swaplora_server.http.wire import ChatBody, CompletionBody, GenerationBody
from swaplora_server.service.admission import Admissions
from swaplora_server.service.detokenize import TextToken
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generation import Generation, Piece
from swaplora_server.service.metrics.records import GenerationRecord, Outcome
from swaplora_server.service.service import Service
from swaplora_server.service.tracing.tracing import Tracing
from swaplora_server.service.wakeups import Wakeups

TOKENIZER = tiny.byte_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER.backend_tokenizer)
HEAD = {"id": "some-id", "created": 1700000000, "model": 'a "model" of Ω', "object": "chunk"}
LOGPROBS = st.builds(
    Logprobs, st.floats(-100, 0), st.lists(st.tuples(st.integers(0, 255), st.floats(-100, 0)), max_size=2).map(tuple)
)
TOKENS = st.builds(TextToken, st.integers(0, 258), st.binary(max_size=2), LOGPROBS)
PIECES = st.builds(
    Piece,
    st.integers(0, 15),
    st.text(),
    st.none() | st.integers(0, 258),
    st.lists(TOKENS, max_size=2),
    st.none() | st.sampled_from([FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT]),
)


class Told:
    """A generation that says what it is told to, in batches; an error is raised where one stands."""

    num_prompt_tokens = 7
    num_cached_tokens = 0
    num_choices = 2

    def __init__(self, batches: list[list[Piece | RequestError]]) -> None:
        self._batches = batches
        self.num_generated = [0]
        self.outcome: Outcome | None = None

    async def arrival(self) -> None:
        pass

    def arrived(self) -> Iterator[Piece]:
        batch = self._batches.pop(0)
        if not self._batches:
            self.outcome = Outcome.COMPLETED
        for piece in batch:
            if isinstance(piece, RequestError):
                self.outcome = Outcome.FAILED
                raise piece
            self.num_generated[0] += 1
            yield piece


def stream(
    form: answers.AnswerFormat, body: GenerationBody, *batches: list[Piece | RequestError]
) -> AsyncGenerator[bytes]:
    told = cast(Generation, Told(list(batches)))
    return answers._Stream(body, told, form, HEAD).events()  # noqa: SLF001


def written(events: AsyncGenerator[bytes]) -> list[bytes]:
    async def collect() -> list[bytes]:
        return [write async for write in events]

    return asyncio.run(collect())


def chat_format() -> answers.AnswerFormat:
    return chat._format(VOCABULARY, has_logprobs=True)  # noqa: SLF001


def completion_format() -> answers.AnswerFormat:
    return completions._format(VOCABULARY, has_logprobs=False)  # noqa: SLF001


def body_of(kind: type[GenerationBody], **fields: Any) -> GenerationBody:
    own = {"messages": [{"role": "user", "content": "x"}]} if kind is ChatBody else {"prompt": "x"}
    return kind.model_validate({"model": "m", "stream": True, **own, **fields})


def usage(num_generated: int) -> dict[str, Any]:
    told = Told([])
    told.num_generated = [num_generated]
    return answers.usage(cast(Generation, told))


def events(*chunks: dict[str, Any]) -> bytes:
    """The reference: each chunk as one object, encoded whole."""
    encoded = [json.dumps(chunk, ensure_ascii=False, separators=(",", ":")) for chunk in chunks]
    return "".join(f"data: {chunk}\n\n" for chunk in encoded).encode()


def completion_choices(piece: Piece) -> list[dict[str, Any]]:
    return [{"index": piece.choice, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}]


def chat_choices(piece: Piece) -> list[dict[str, Any]]:
    def token(token_id: int, logprob: float, data: bytes) -> dict[str, Any]:
        return {"token": data.decode(errors="backslashreplace"), "logprob": logprob, "bytes": list(data)}

    def with_others(one: TextToken) -> dict[str, Any]:
        assert one.logprobs
        whole = VOCABULARY.bytes_of(one.token_id)
        chosen = token(one.token_id, one.logprobs.chosen, one.data or whole) | {"bytes": list(one.data)}
        others = [token(*other, VOCABULARY.bytes_of(other[0])) for other in one.logprobs.top]
        return chosen | {"top_logprobs": others}

    logprobs = {"content": [with_others(one) for one in piece.tokens]} if piece.tokens else None
    choices: list[dict[str, Any]] = []
    if piece.text or piece.tokens or piece.token_id is not None:
        delta = {"content": piece.text}
        choices.append({"index": piece.choice, "delta": delta, "logprobs": logprobs, "finish_reason": None})
    if piece.finish_reason is not None:
        choices.append({"index": piece.choice, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason})
    return choices


def with_ids(choices: list[dict[str, Any]], token_id: int | None) -> list[dict[str, Any]]:
    """The piece's token goes with its first chunk."""
    ids = [] if token_id is None else [token_id]
    return [{**choice, "token_ids": [] if number else ids} for number, choice in enumerate(choices)]


@pytest.mark.parametrize(
    ("kind", "form", "choices"),
    [(CompletionBody, completion_format(), completion_choices), (ChatBody, chat_format(), chat_choices)],
)
@given(pieces=st.lists(PIECES, min_size=1, max_size=3), has_ids=st.booleans(), is_counting=st.booleans())
def test_a_chunk_is_the_one_object_encoded_whole(
    kind: type[GenerationBody],
    form: answers.AnswerFormat,
    choices: Callable[[Piece], list[dict[str, Any]]],
    pieces: list[Piece],
    has_ids: bool,
    is_counting: bool,
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": is_counting}
    body = body_of(kind, return_token_ids=has_ids, stream_options=options)
    chunks: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces, start=1):
        said = with_ids(choices(piece), piece.token_id) if has_ids else choices(piece)
        counts = {"usage": usage(number)} if is_counting else {}
        chunks += [{**HEAD, "choices": [choice], **counts} for choice in said]
    opening = [
        {"index": n, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        for n in range(2 if kind is ChatBody else 0)
    ]
    opened = [{**HEAD, "choices": [choice], **({"usage": usage(0)} if is_counting else {})} for choice in opening]
    last = {**HEAD, "choices": [], "usage": usage(len(pieces))}
    expected = events(*opened, *chunks, last) + DONE.encode()
    assert b"".join(written(stream(form, body, [*pieces]))) == expected


def test_what_comes_together_goes_out_in_one_write_with_an_event_each() -> None:
    pieces = [Piece(0, text, 65, (), None) for text in "abc"]
    writes = written(stream(completion_format(), body_of(CompletionBody), [*pieces[:2]], [pieces[2]]))
    assert [write.count(b"data: ") for write in writes] == [2, 1, 1]


FAILING: list[Piece | RequestError] = [Piece(0, "a", 65, (), None), RequestError("engine_failed", "it broke")]


class Client:
    """One end of ASGI that reads all and stays; it may be told of what it was sent."""

    def __init__(self) -> None:
        self.got: list[Message] = []
        self.has_got = asyncio.Event()

    async def receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.got.append(message)
        self.has_got.set()

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.got if message["type"] == "http.response.body")


async def respond(client: Client, events: AsyncGenerator[bytes]) -> None:
    response = EventStreamResponse(events, {}, at_end=lambda: None)
    await response({"type": "http", "method": "POST", "headers": []}, client.receive, client.send)


async def test_what_came_before_an_error_goes_out_before_it_and_no_usage_follows() -> None:
    body = body_of(CompletionBody, stream_options={"include_usage": True})
    client = Client()
    await respond(client, stream(completion_format(), body, FAILING))
    said = client.body.decode().split("\n\n")
    assert json.loads(said[0].removeprefix("data: "))["choices"][0]["text"] == "a"
    assert json.loads(said[1].removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert said[2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
async def test_an_error_before_the_first_token_is_no_stream(kind: type[GenerationBody]) -> None:
    form = chat_format() if kind is ChatBody else completion_format()
    client = Client()
    with pytest.raises(RequestError, match="it broke"):
        await respond(client, stream(form, body_of(kind), FAILING[1:]))
    assert client.got == []


async def test_a_comment_keeps_a_silent_stream_alive_and_an_error_then_is_an_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.0)
    client = Client()

    async def silent() -> AsyncGenerator[bytes]:
        await client.has_got.wait()
        monkeypatch.setattr(sse, "PING_SECONDS", 3600.0)
        if client.got:
            raise RequestError("engine_failed", "it broke")
        yield b""

    await respond(client, silent())
    assert [message["type"] for message in client.got].count("http.response.start") == 1
    ping, *_, error, done, _ = client.body.decode().split("\n\n")
    assert ping == ": ping"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert done == "data: [DONE]"


def test_a_choice_is_opened_in_the_write_of_the_first_token() -> None:
    pieces = [Piece(0, text, 65, (), None) for text in "ab"]
    writes = written(stream(chat_format(), body_of(ChatBody), [], [pieces[0]], [pieces[1]]))
    deltas = [
        [json.loads(data.removeprefix("data: "))["choices"][0]["delta"] for data in write.decode().split("\n\n")[:-1]]
        for write in writes[:2]
    ]
    assert deltas == [[{"role": "assistant", "content": ""}] * 2 + [{"content": "a"}], [{"content": "b"}]]


async def encode() -> list[list[int]]:
    return [[1, 2, 3]]


def generation(body: GenerationBody) -> tuple[Generation, list[GenerationRecord]]:
    """A generation of one prompt on nothing, and what it reports when it ends."""
    records: list[GenerationRecord] = []
    service = SimpleNamespace(
        is_base=lambda _model: True,
        tenant="",
        wakeups=Wakeups(),
        base=SimpleNamespace(vocabulary=VOCABULARY),
        metrics=SimpleNamespace(observe=records.append),
        tracing=Tracing(is_on=False),
        engine=SimpleNamespace(submit=lambda _request: None, abort=lambda _request, _index=None: None),
    )
    request = HttpRequest({"type": "http", "headers": [], "state": {"caller": ANYBODY}})
    task = task_of(request, cast(Service, service), body, encode, num_prompts=1, max_tokens=100)
    made = Generation(cast(Service, service), task, [[1, 2, 3]], task.sampling, (), began=0.0)
    made.submit((), [0], Admissions(0, 1).admit(1))
    return made, records


def say(to: Generation, *tokens: int, finish_reason: FinishReason | None = None) -> None:
    """What the engine's thread would post; the last token ends the sequence if a reason is given."""
    for number, token in enumerate(tokens, start=1):
        to._post(0, TokenEvent(0, token, None, finish_reason if number == len(tokens) else None))  # noqa: SLF001


async def is_woken(by: Generation) -> bool:
    reader = asyncio.ensure_future(by.arrival())
    for _ in range(4):
        await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait({reader})
    return not reader.cancelled()


async def test_a_stream_is_woken_for_one_token_and_a_whole_answer_for_many_or_for_its_end() -> None:
    streamed, _ = generation(body_of(CompletionBody))
    say(streamed, 65)
    assert await is_woken(streamed)
    whole, _ = generation(body_of(CompletionBody, stream=False))
    say(whole, *[65] * 31)
    assert not await is_woken(whole)
    say(whole, 66)
    assert await is_woken(whole)
    assert "".join(piece.text for piece in whole.arrived()) == TOKENIZER.decode([*[65] * 31, 66])
    say(whole, 67, finish_reason=FinishReason.LENGTH)
    assert await is_woken(whole)


async def test_a_whole_answer_with_a_stop_string_is_read_token_by_token() -> None:
    whole, _ = generation(body_of(CompletionBody, stream=False, stop="zz"))
    say(whole, 65)
    assert await is_woken(whole)


async def test_a_generation_reports_once_how_it_ended() -> None:
    completed, records = generation(body_of(CompletionBody))
    say(completed, 65, 66, finish_reason=FinishReason.LENGTH)
    assert len(list(completed.arrived())) == 2
    completed.abort()
    assert [(one.outcome, one.num_prompt_tokens, one.num_generated_tokens) for one in records] == [
        (Outcome.COMPLETED, 3, 2)
    ]
    left, records = generation(body_of(CompletionBody))
    say(left, 65)
    list(left.arrived())
    left.abort()
    left.abort()
    assert [one.outcome for one in records] == [Outcome.ABANDONED]
    assert records[0].seconds_per_token is None
    failed, records = generation(body_of(CompletionBody))
    failed._post(0, TokenEvent(0, finish_reason=FinishReason.ERROR, error="it broke"))  # noqa: SLF001
    with pytest.raises(RequestError, match="it broke"):
        list(failed.arrived())
    assert [(one.outcome, one.seconds_to_first) for one in records] == [(Outcome.FAILED, None)]
    assert list(failed.arrived()) == []


class SlowClient:
    """One end of ASGI: it reads nothing of the body until it is let, and leaves when told to."""

    def __init__(self) -> None:
        self.reads, self.leaves = asyncio.Event(), asyncio.Event()
        self.got: list[bytes] = []

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            await self.reads.wait()
            self.got.append(message["body"])


async def counting(made: list[int]) -> AsyncGenerator[bytes]:
    for number in range(100):
        made.append(number)
        yield b"%d " % number


async def answered(client: SlowClient, made: list[int], ended: list[bool]) -> None:
    response = EventStreamResponse(counting(made), {}, at_end=lambda: ended.append(True))
    await response({"type": "http", "method": "GET", "headers": []}, client.receive, client.send)


async def test_a_client_that_reads_slowly_has_its_stream_wait_for_it() -> None:
    client, made, ended = SlowClient(), list[int](), list[bool]()
    answer = asyncio.ensure_future(answered(client, made, ended))
    for _ in range(50):
        await asyncio.sleep(0)
    assert made == [0]
    client.reads.set()
    async with asyncio.timeout(60):
        await answer
    assert b"".join(client.got) == b"".join(b"%d " % number for number in range(100))
    assert ended == [True]


async def test_a_client_that_leaves_without_reading_ends_its_stream() -> None:
    client, made, ended = SlowClient(), list[int](), list[bool]()
    answer = asyncio.ensure_future(answered(client, made, ended))
    for _ in range(50):
        await asyncio.sleep(0)
    client.leaves.set()
    async with asyncio.timeout(60):
        await answer
    assert (made, client.got, ended) == ([0], [], [True])
