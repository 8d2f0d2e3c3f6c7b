"""What the ingress does where something fails, ends or is too much: each time one answer, and bounded work."""

import asyncio
import gzip
import json
import signal
import socket
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from scripted import EVENTS, JSON, KEY, MIB, Asked, Scripted, answer, ask, front
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key
from swaplora_server.access.key_ring import KeyRing
from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.exchange import WANTS_BODY, Answer, Exchange, Forwarded
from swaplora_server.cluster.front import bodies as bodies_module
from swaplora_server.cluster.front import passage as passage_module
from swaplora_server.cluster.front.bodies import PART_BYTES, next_part
from swaplora_server.cluster.front.ingress import Ingress
from swaplora_server.cluster.front.route_key import ANYWHERE, key_of_body
from swaplora_server.cluster.gathered import missing
from swaplora_server.config import Settings
from swaplora_server.http.transport.body_memory import BodyMemory
from swaplora_server.serve import _Server

OF_ALL = [
    ("GET", "/health"),
    ("HEAD", "/health/ready"),
    ("GET", "/ping"),
    ("GET", "/metrics"),
    ("GET", "/v1/evaluations"),
    ("DELETE", "/v1/evaluations/a"),
    ("POST", "/v1/evaluations/a/cancel"),
]


@pytest.mark.parametrize(("method", "path"), OF_ALL)
def test_a_body_is_not_copied_to_all(method: str, path: str) -> None:
    engines = Scripted(answers=[Answer("r0", 200, [], b'{"data": [], "has_more": false}')])
    asyncio.run(ask(front(engines), method, path, b"x" * MIB, KEY))
    assert {(len(request.body), request.is_whole) for request in engines.asked} == {(0, True)}


@pytest.mark.parametrize(("method", "path"), OF_ALL)
def test_without_a_key_all_are_asked_only_what_is_public(method: str, path: str) -> None:
    engines = Scripted(messages=answer(401), answers=[Answer("r0", 200, [], b"")])
    found = asyncio.run(ask(front(engines), method, path, b"x" * MIB))
    is_public = path in ("/health", "/health/ready", "/ping")
    assert (len(engines.asked), len(engines.streamed), found.status) == ((1, 0, 200) if is_public else (0, 1, 401))
    assert all(not request.body for request in engines.streamed)


def test_json_of_too_many_parts_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_raw: bytes) -> None:
        raise AssertionError("it is parsed")

    monkeypatch.setattr("swaplora_server.cluster.front.route_key.from_json", never)
    assert key_of_body(b'{"model":"m","x":[' + b"[]," * MIB + b"1]}", "", "base") == ANYWHERE


def test_what_is_decoded_is_counted_and_few_are_parsed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engines, seen, running, most = Scripted(), [], [0], [0]
    app = front(engines, max_body_bytes=8 * MIB, body_memory_bytes=40 * MIB)  # half for one tenant

    def slow(raw: bytes, **_: Any) -> RouteKey:
        running[0] += 1
        most[0] = max(most[0], running[0])
        seen.append((len(raw), app._bodies.used_bytes))  # noqa: SLF001
        time.sleep(0.1)
        running[0] -= 1
        return ANYWHERE

    monkeypatch.setattr(bodies_module, "key_of_body", slow)
    bomb = gzip.compress(b'{"model":"' + b"a" * (6 * MIB) + b'"}')

    async def all_of_them() -> list[Asked]:
        headers = [*JSON, (b"content-encoding", b"gzip")]
        return await asyncio.gather(*(ask(app, "POST", "/v1/completions", bomb, headers) for _ in range(6)))

    assert {found.status for found in asyncio.run(all_of_them())} == {200}
    assert 0 < len(seen) <= 3  # as many as there is memory for; the others go anywhere
    assert all(decoded <= used <= 20 * MIB for decoded, used in seen)
    assert most[0] <= 2
    assert app._bodies.used_bytes == 0  # noqa: SLF001


def test_json_that_is_too_large_by_its_length_is_not_read() -> None:
    engines = Scripted(messages=answer(413))
    found = asyncio.run(ask(front(engines, max_body_bytes=1 << 16), "POST", "/v1/completions", b" " * MIB, JSON))
    assert (found.status, found.num_read) == (413, 0)
    assert [(request.body, request.is_whole) for request in engines.streamed] == [(b"", False)]


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/ping", "/metrics", "/v1/evaluations"])
def test_without_replicas_there_is_an_answer(path: str) -> None:
    assert asyncio.run(ask(front(Scripted()), "GET", path, headers=KEY)).code == "not_ready"


def test_what_nobody_foresaw_is_answered() -> None:
    origin = (b"origin", b"http://localhost:3000")
    found = asyncio.run(ask(front(Scripted(answers=[TypeError("x")])), "GET", "/health", headers=[origin]))
    headers = dict(found.sent[0]["headers"])
    assert (found.status, found.code) == (500, "internal_error")
    assert headers[b"access-control-allow-origin"] == b"http://localhost:3000"
    assert b"x-request-id" in headers


def test_a_part_that_nobody_takes_ends_the_upload() -> None:
    engines = Scripted(messages=[{"type": WANTS_BODY}], hangs=True)
    headers = [*KEY, (b"content-type", b"multipart/form-data; boundary=x")]
    assert asyncio.run(ask(front(engines), "PUT", "/v1/adapters/a", b"part", headers)).code == "engine_failed"


def test_the_first_that_is_well_answers_for_all() -> None:
    """And nobody waits for one that hangs."""
    engines = Scripted(answers=[Answer("r0", 503, [], b""), Answer("r1", 200, [], b""), 3600.0])
    assert asyncio.run(ask(front(engines), "GET", "/health")).status == 200
    assert engines.is_closed


def test_what_is_not_found_is_answered_if_no_other_replica_does() -> None:
    engines = Scripted(messages=answer(404, b"not here"))
    found = asyncio.run(ask(front(engines), "GET", "/v1/adapters/x", headers=KEY))
    assert [message.get("status", message.get("body")) for message in found.sent] == [404, b"not here"]
    assert engines.asked[0].exchange_id != engines.streamed[0].exchange_id  # which still runs
    engines.answers = [Answer("r1", 200, [], b"here")]
    found = asyncio.run(ask(front(engines), "GET", "/v1/adapters/x", headers=KEY))
    assert [message.get("status", message.get("body")) for message in found.sent] == [200, b"here"]


@pytest.mark.parametrize(("path", "headers"), [("/v1/adapters/x", ()), ("/v1/adapters/x/no-route", KEY)])
def test_what_no_replica_can_have_is_asked_of_one(path: str, headers: Any) -> None:
    engines = Scripted(messages=answer(404, b"not here"))
    assert asyncio.run(ask(front(engines), "DELETE", path, headers=headers)).status == 404
    assert (len(engines.streamed), engines.asked) == (1, [])


def test_what_there_is_no_memory_for_is_not_read_and_no_tenant_has_all_of_it(tmp_path: Path) -> None:
    """And nothing is read for who may not generate."""
    file = tmp_path / "keys.yaml"
    one, other = (create_key(file, tenant, (KeyScope.GENERATE,), None)[0] for tenant in ("default", "acme"))
    reader, _ = create_key(file, "acme", (KeyScope.METRICS,), None)
    engines = Scripted(messages=answer(429))
    own = Settings(key_file=file, max_body_bytes=4 * MIB, body_memory_bytes=4 * MIB)
    app = Ingress(own, engines, KeyRing([], file))

    def of(key: str) -> Any:
        return [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]

    async def go() -> None:
        goes_on, has_read = asyncio.Event(), asyncio.Event()

        async def receive() -> Message:
            if has_read.is_set():
                await goes_on.wait()
            has_read.set()
            return {"type": "http.request", "body": b" " * (3 * MIB // 2), "more_body": True}

        slow = asyncio.ensure_future(ask(app, "POST", "/v1/completions", b"x", of(one), receive=receive))
        await has_read.wait()
        await ask(app, "POST", "/v1/completions", b"x" * MIB, of(other))
        assert [(len(request.body), request.is_whole) for request in engines.streamed] == [(MIB, True)]
        goes_on.set()
        await slow
        assert [(len(request.body), request.is_whole) for request in engines.streamed[1:]] == [(3 * MIB, False)]
        found = await ask(app, "POST", "/v1/completions", b"x" * MIB, of(reader))
        assert (found.num_read, engines.streamed[-1].body) == (0, b"")

    asyncio.run(go())
    assert app._bodies.used_bytes == 0  # noqa: SLF001


async def test_what_comes_slowly_is_passed_on_and_not_kept() -> None:
    memory = BodyMemory(4 * PART_BYTES)
    account = memory.account()
    parts = [b"ab", b"", b"c" * PART_BYTES, b"d" * PART_BYTES, b"e"]

    async def receive() -> Message:
        if not parts[0]:
            parts[0] = b"late"
            await asyncio.Event().wait()  # until nobody waits any more
        body = parts.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    assert await next_part(receive, account) == (b"ab", False)
    assert await next_part(receive, account) == (b"late" + b"c" * PART_BYTES, False)
    assert memory.used_bytes == account.num_bytes == PART_BYTES + 6
    account.close()
    full = memory.account()
    full.add(4 * PART_BYTES)
    assert await next_part(receive, account) == (b"d" * PART_BYTES, False)  # it is here, and goes on all the same
    assert await next_part(receive, account) == (b"e", True)


async def test_who_has_gone_is_told_nothing_more() -> None:
    """As by a connection that has ended: an app that answers it all the same does not fail."""
    has_ended: list[bool] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await send(EVENTS[0])
        while (await receive())["type"] != "http.disconnect":
            pass
        await send(EVENTS[1])
        has_ended.append(True)

    messages = Exchange(app, Forwarded({}, b"", True, "one")).messages()
    assert await anext(messages) == [EVENTS[0]]
    await messages.aclose()
    assert has_ended == [True]


@pytest.mark.parametrize("path", ["/metrics", "/v1/adapters/x"])
def test_who_goes_while_all_are_asked_is_not_waited_for(path: str) -> None:
    engines = Scripted(messages=answer(404), answers=[3600.0])

    async def go() -> Asked:
        gone = asyncio.Event()
        asking = asyncio.ensure_future(ask(front(engines), "GET", path, headers=KEY, gone=gone))
        while not engines.asked:
            await asyncio.sleep(0)
        gone.set()
        return await asking

    assert asyncio.run(go()).sent == []
    assert engines.is_closed


def test_the_end_is_told_to_a_stream_by_an_event_and_to_others_by_status() -> None:
    engines = Scripted(messages=EVENTS, hangs=True)
    app = front(engines)

    def end(message: Message) -> None:
        if message.get("body"):
            app.drain()
            app.end_all()

    found = asyncio.run(ask(app, "POST", "/v1/completions", b"{}", JSON, on_sent=end))
    *_, told, done = found.sent[-1]["body"].decode().strip().split("\n\n")
    assert json.loads(told.removeprefix("data: "))["error"]["code"] == "draining"
    assert (done, found.sent[-1]["more_body"]) == ("data: [DONE]", False)
    assert asyncio.run(ask(app, "POST", "/v1/completions", b"{}", JSON)).code == "draining"
    assert asyncio.run(ask(app, "GET", "/health/ready")).code == "draining"
    assert len(engines.streamed) == 1
    engines.answers = [Answer("r0", 200, [], b"")]
    assert asyncio.run(ask(app, "GET", "/health")).status == 200  # else it would be killed while it ends


@pytest.mark.parametrize(
    "last", [b"data: [DONE]\n\n", b"event: message_stop\ndata: {}\n\n", b"event: response.completed\ndata: {}\n\n"]
)
def test_behind_the_last_event_comes_none_whatever_becomes_of_the_replica(last: bytes) -> None:
    messages = [*EVENTS, {**EVENTS[1], "body": last}]
    found = asyncio.run(ask(front(Scripted(messages, is_lost=True)), "POST", "/v1/completions", b"{}", JSON))
    assert b"".join(message.get("body", b"") for message in found.sent) == EVENTS[1]["body"] + last
    assert not found.sent[-1]["more_body"]
    found = asyncio.run(ask(front(Scripted(EVENTS, is_lost=True)), "POST", "/v1/completions", b"{}", JSON))
    assert b"engine_failed" in found.sent[-1]["body"]


def test_a_stream_of_a_replica_that_hangs_ends_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream has at least a ping every so often, so that one without any is known by it."""
    monkeypatch.setattr(passage_module, "SILENT_SECONDS", 0.05)
    found = asyncio.run(ask(front(Scripted(EVENTS, hangs=True)), "POST", "/v1/completions", b"{}", JSON))
    assert b"engine_failed" in found.sent[-1]["body"]


def test_who_has_the_whole_answer_ends_nothing_at_the_replica() -> None:
    """Though the server says then that the client goes: the replica ends by itself, and is waited for."""
    engines = Scripted()

    async def go() -> None:
        is_whole = asyncio.Event()

        def note(message: Message) -> None:
            if message.get("more_body") is False:
                is_whole.set()

        async def receive() -> Message:
            await is_whole.wait()
            return {"type": "http.disconnect"}

        await ask(front(engines), "GET", "/v1/models", headers=KEY, on_sent=note, receive=receive)

    asyncio.run(go())
    assert engines.has_ended


def test_no_longer_than_the_client_waits_is_waited_for_a_replica() -> None:
    class Nobody(Scripted):
        async def stream(self, _key: RouteKey, request: Forwarded) -> AsyncGenerator[list[Message]]:
            self.streamed.append(request)
            await asyncio.Event().wait()
            yield []

    began = time.monotonic()
    headers = [*JSON, (b"x-request-timeout", b"0.1")]
    assert asyncio.run(ask(front(Nobody()), "POST", "/v1/completions", b"{}", headers)).code == "deadline_exceeded"
    assert time.monotonic() - began < 25


def test_a_late_replica_is_not_one_that_has_nothing() -> None:
    engines = Scripted(answers=[Answer("r0", 404, [], b"nothing"), missing()])
    found = asyncio.run(ask(front(engines), "DELETE", "/v1/evaluations/e1", headers=KEY))
    assert (found.status, found.code) == (503, "not_ready")
    engines.answers.append(Answer("r2", 200, [], b"here"))
    assert asyncio.run(ask(front(engines), "DELETE", "/v1/evaluations/e1", headers=KEY)).status == 200


async def test_a_websocket_is_closed() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    await front(Scripted())({"type": "websocket", "path": "/v1/models", "headers": []}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_front_that_ends_has_its_streams_end_by_an_event() -> None:
    settings = Settings(drain_seconds=0.1, port=0)
    body = b"{}"
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"

    async def seen() -> bytes:
        app = Ingress(settings, Scripted(messages=EVENTS, hangs=True), KeyRing([], None))
        loop = asyncio.get_running_loop()
        server = _Server(app, settings, app.drain, lambda: loop.call_soon_threadsafe(app.end_all))
        listener = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(head.encode() + body)
        begun = await reader.readuntil(b"data: {}\n\n")
        server.handle_exit(signal.SIGTERM, None)
        rest = await reader.read()
        writer.close()
        await serving
        return begun + rest

    assert b'"code":"draining"' in (told := asyncio.run(seen()))
    assert told.endswith(b"\r\n0\r\n\r\n")
