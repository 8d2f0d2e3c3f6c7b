"""A request whose replica is lost or unwell goes to the next one: once or twice, in time, and nothing is done twice."""

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from scripted import EVENTS, JSON, KEY, MIB, Asked, Scripted, answer, ask, front
from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.engines import ReplicaLostError
from swaplora_server.cluster.exchange import WANTS_BODY, Forwarded
from swaplora_server.cluster.front import tries
from swaplora_server.cluster.front.tries import MAX_TRIES

FORM = [*KEY, (b"content-type", b"multipart/form-data; boundary=x")]


@dataclass
class Failing(Scripted):
    """Each try has the next fault of these, then all is well."""

    faults: list[str] = field(default_factory=list)
    tried: list[list[str]] = field(default_factory=list)
    fed: list[tuple[str, bytes]] = field(default_factory=list)  # by try's id
    reads: bool = False
    has_more: asyncio.Event = field(default_factory=asyncio.Event)

    async def stream(self, key: RouteKey, request: Forwarded) -> AsyncGenerator[list[Message]]:
        number = len(self.streamed)
        fault = self.faults[number] if number < len(self.faults) else ""
        self.streamed.append(request)
        key.tried.append(f"r{number}")
        self.tried.append(list(key.tried))
        if fault == "unreached":
            raise ReplicaLostError("a fault of the test")
        if fault == "hangs":
            await asyncio.Event().wait()
        yield []
        if fault == "lost":
            raise ReplicaLostError("a fault of the test")
        if fault == "unwell":
            for message in answer(503, b"unwell"):
                yield [message]
            return
        if self.reads:
            yield [{"type": WANTS_BODY}]
            if fault == "lost while it reads":
                raise ReplicaLostError("a fault of the test")
            await self.has_more.wait()
        if fault == "lost when it has it":
            raise ReplicaLostError("a fault of the test")
        for message in self.messages:
            yield [message]
            if fault == "lost when it answers":
                raise ReplicaLostError("a fault of the test")

    async def feed(self, exchange_id: str, body: bytes, *, is_last: bool) -> None:
        self.fed.append((exchange_id, body))
        self.has_more.set()


def asked(engines: Scripted, method: str = "POST", path: str = "/v1/completions", **fields: Any) -> Asked:
    return asyncio.run(ask(front(engines), method, path, **{"body": b'{"model":"a"}', "headers": JSON, **fields}))


@pytest.mark.parametrize("fault", ["unreached", "hangs", "lost", "unwell"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/chat/completions"), ("GET", "/v1/models")])
def test_the_next_one_answers(monkeypatch: pytest.MonkeyPatch, fault: str, method: str, path: str) -> None:
    monkeypatch.setattr(tries, "_TAKEN_SECONDS", 0.05)
    engines = Failing(answer(200, b"well"), faults=[fault])
    body = b'{"model":"a"}' if method == "POST" else b""
    found = asked(engines, method, path, body=body)
    assert [message.get("status", message.get("body")) for message in found.sent] == [200, b"well"]
    assert engines.tried == [["r0"], ["r0", "r1"]]
    assert [request.body for request in engines.streamed] == [body] * 2
    assert len({request.exchange_id for request in engines.streamed}) == 2  # the first may still have its own


@given(st.lists(st.sampled_from(["unreached", "lost", "unwell"]), max_size=4))
def test_no_more_than_two_have_it_and_three_are_asked(faults: list[str]) -> None:
    """So that what brings a replica down is not shown to all of them."""
    engines = Failing(faults=faults)
    found = asked(engines)
    had = [number for number, fault in enumerate(faults) if fault != "unreached"]
    first_over = min([MAX_TRIES - 1, *had[1:2]])
    num_tries = min(first_over, len(faults)) + 1
    assert len(engines.streamed) == num_tries
    last = faults[num_tries - 1] if num_tries <= len(faults) else ""
    assert found.status == (503 if last else 200)
    if last in ("unreached", "lost"):
        assert found.code == "engine_failed"


def test_nothing_is_repeated_once_it_is_answered() -> None:
    engines = Failing(EVENTS, faults=["lost when it answers"])
    assert b"engine_failed" in asked(engines).sent[-1]["body"]
    assert len(engines.streamed) == 1


@pytest.mark.parametrize("fault", ["unreached", "lost", "unwell"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/adapters/a/warm"),
        ("DELETE", "/v1/adapters/a"),
        ("DELETE", "/v1/aliases/a"),
        ("PATCH", "/v1/adapters/a"),
        ("POST", "/v1/evaluations"),
        ("POST", "/v1/keys"),
        ("POST", "/v1/load_lora_adapter"),
    ],
)
def test_what_may_have_been_done_is_not_repeated(method: str, path: str, fault: str) -> None:
    engines = Failing(faults=[fault])
    assert asked(engines, method, path).status == 503
    assert len(engines.streamed) == 1


@pytest.mark.parametrize("fault", ["unreached", "lost", "unwell"])
def test_an_upload_of_which_nobody_has_anything_goes_to_the_next(fault: str) -> None:
    engines = Failing(answer(201), faults=[fault], reads=True)
    assert asked(engines, "PUT", "/v1/adapters/a", body=b"all of it", headers=FORM).status == 201
    assert engines.fed == [(engines.streamed[1].exchange_id, b"all of it")]


@pytest.mark.parametrize("fault", ["lost while it reads", "lost when it has it"])
def test_an_upload_that_may_be_done_does_not(fault: str) -> None:
    engines = Failing(answer(201), faults=[fault], reads=True)
    found = asked(engines, "PUT", "/v1/adapters/a", body=b"all of it", headers=FORM)
    assert (found.code, len(engines.streamed)) == ("engine_failed", 1)


class Late(Failing):
    async def stream(self, key: RouteKey, request: Forwarded) -> AsyncGenerator[list[Message]]:
        async for sent in super().stream(key, request):
            yield sent
            await asyncio.sleep(0.1)


def test_the_next_one_has_the_time_that_is_left() -> None:
    engines = Late(faults=["lost"])
    assert asked(engines, headers=[*JSON, (b"x-request-timeout", b"50")]).status == 200
    first, second = (dict(request.scope["headers"])[b"x-request-timeout"] for request in engines.streamed)
    assert first == b"50"
    assert 0 < float(second) < 50


@pytest.mark.parametrize("told", [b"soon", b"0", b"-1", b"nan", b"inf", b"86400.1"])
def test_a_time_that_is_none_is_for_the_next_one_to_refuse_too(told: bytes) -> None:
    engines = Failing(faults=["lost"])
    asked(engines, headers=[*JSON, (b"x-request-timeout", told)])
    assert [dict(request.scope["headers"])[b"x-request-timeout"] for request in engines.streamed] == [told] * 2


def test_nobody_is_asked_when_there_is_no_time() -> None:
    engines = Late(faults=["lost"])
    assert asked(engines, headers=[*JSON, (b"x-request-timeout", b"0.05")]).code == "engine_failed"
    assert len(engines.streamed) == 1


@pytest.mark.parametrize("fault", ["", "hangs"])
@pytest.mark.parametrize("messages", [[], EVENTS])
def test_the_time_is_over_wherever_it_passes(fault: str, messages: list[Message]) -> None:
    """Whatever the replica that has the request still counts, or where none takes it; asking again is in vain."""

    class Silent(Failing):
        async def stream(self, key: RouteKey, request: Forwarded) -> AsyncGenerator[list[Message]]:
            async for sent in super().stream(key, request):
                yield sent
            await asyncio.Event().wait()

    engines = Silent(messages, faults=[fault] * MAX_TRIES)
    found = asked(engines, headers=[*JSON, (b"x-request-timeout", b"0.05")])
    if messages and not fault:
        assert b"deadline_exceeded" in found.sent[-1]["body"]
    else:
        assert (found.status, found.code) == (504, "deadline_exceeded")
        assert (b"x-should-retry", b"false") in found.sent[0]["headers"]


def test_what_was_made_in_time_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slowly the client takes what was before it."""
    now = [0.0]
    monkeypatch.setattr(tries, "time", SimpleNamespace(monotonic=lambda: now[0]))
    end = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}

    def take(message: Message) -> None:
        if message.get("more_body"):
            now[0] = 60.0

    engines = Scripted([*EVENTS, end])
    found = asked(engines, headers=[*JSON, (b"x-request-timeout", b"50")], on_sent=take)
    assert found.sent[-1]["body"] == end["body"]


def test_who_goes_is_not_asked_for_again() -> None:
    async def go() -> Failing:
        engines, gone = Failing(faults=["unreached", "hangs"]), asyncio.Event()
        asking = asyncio.ensure_future(ask(front(engines), "GET", "/v1/models", headers=KEY, gone=gone))
        while len(engines.streamed) < 2:
            await asyncio.sleep(0)
        gone.set()
        assert (await asking).sent == []
        return engines

    assert len(asyncio.run(go()).streamed) == 2


@pytest.mark.parametrize(
    ("path", "messages"), [("/v1/completions", EVENTS), ("/v1/adapters/a/warm", []), ("/v1/completions", [])]
)
def test_a_body_is_kept_until_no_replica_needs_it(path: str, messages: list[Message]) -> None:
    """Until its answer begins, or for what is never repeated until a replica has it; and it is kept nowhere then."""

    class Forgetful(Scripted):
        async def stream(self, _key: RouteKey, request: Forwarded) -> AsyncGenerator[list[Message]]:
            assert len(request.body) == 8 * MIB
            del request
            yield []
            for message in self.messages:
                yield [message]
            has_said_all.set()
            await asyncio.Event().wait()

    has_said_all = asyncio.Event()
    is_kept = not messages and path == "/v1/completions"

    async def receive() -> Message:
        if not has_read:
            has_read.append(True)
            return {"type": "http.request", "body": bytes(8 * MIB), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def go() -> None:
        app = front(Forgetful(messages), body_memory_bytes=32 * MIB, max_body_bytes=8 * MIB)
        tracemalloc.start()
        headers = [*JSON, (b"content-length", b"%d" % (8 * MIB))]
        asking = asyncio.ensure_future(ask(app, "POST", path, headers=headers, receive=receive))
        await has_said_all.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        await asyncio.get_running_loop().shutdown_default_executor()  # whose threads have read it
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
        assert app._bodies.used_bytes == 8 * MIB * is_kept  # noqa: SLF001
        assert (kept > 8 * MIB) == is_kept
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert app._bodies.used_bytes == 0  # noqa: SLF001

    has_read: list[bool] = []
    try:
        asyncio.run(go())
    finally:
        tracemalloc.stop()
