"""The first request on a new connection, refused as others were: answered, and nothing made of the connection."""

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from raw_http import connected, read_answer, request
from serving import BASE, Running, serving, settings
from swaplora_server.http.overload.first_requests import FirstRequests
from swaplora_server.http.transport import lingering, server
from swaplora_server.http.transport.heads import MAX_HEAD_BYTES
from swaplora_server.http.transport.lingering import Lingering
from swaplora_server.http.transport.protocol import BoundedHttpProtocol
from swaplora_server.http.transport.server import Acceptor

MAX_WAITING = 3
ASK = "/v1/completions"
WANTED = {"model": BASE, "prompt": [5, 6, 7], "max_tokens": 1}
LAST = request(ASK, WANTED, Connection="close")
FIRST = request(ASK, WANTED)  # of any number


@pytest.fixture(scope="module")
def crowded(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that runs one at a time and lets three wait; one request was refused for that."""
    with serving(settings(base, tmp_path_factory.mktemp("data"), max_num_seqs=1, max_waiting=MAX_WAITING)) as running:
        running.put("sql", adapters[0]).raise_for_status()
        with full(running), connected(running.url) as connection:
            connection.sendall(LAST)
            assert read_answer(connection)[0] == 429
        yield running


def full(running: Running, *, of_all: bool = True) -> ExitStack:
    """All places held; else by one adapter, beside which there is room for others."""
    held = ExitStack()
    held.callback(running.service.admissions.admit(1 + MAX_WAITING, "", BASE, "127.0.0.1").release)
    if of_all:
        held.callback(running.service.admissions.admit(1, "x", BASE, "").release)
    return held


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The connections of which anything was made."""
    connections: list[object] = []
    connection_made = BoundedHttpProtocol.connection_made

    def noted(protocol: BoundedHttpProtocol, transport: asyncio.Transport) -> None:
        connections.append(protocol)
        connection_made(protocol, transport)

    monkeypatch.setattr(BoundedHttpProtocol, "connection_made", noted)
    return connections


def told(running: Running, sent: bytes) -> bytes:
    """All until the server closes; ConnectionResetError if it cuts the connection."""
    with connected(running.url) as connection:
        connection.sendall(sent)
        return b"".join(iter(partial(connection.recv, 1 << 16), b""))


def told_later(running: Running, sent: bytes) -> tuple[int, bytes]:
    """On a connection on which another was answered."""
    with connected(running.url) as connection:
        connection.sendall(request("/version", method="GET"))
        assert read_answer(connection)[0] == 200
        connection.sendall(sent)
        return read_answer(connection)


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


def lines(head: bytes) -> list[bytes]:
    own = (b"x-request-id:", b"date:")
    return [line for line in head.split(b"\r\n") if not line.startswith(own)]


@pytest.mark.parametrize("sent", [LAST, FIRST, request(ASK, WANTED, version="1.0")], ids=["last", "first", "1.0"])
def test_nothing_is_made_of_its_connection(crowded: Running, made: list[object], sent: bytes) -> None:
    with full(crowded):
        head, _, body = told(crowded, sent).partition(b"\r\n\r\n")
        assert not made
        later = told(crowded, request("/version", method="GET") + LAST)
    assert len(made) == 1
    later_head, _, later_body = later[later.index(b"HTTP/1.1 429") :].partition(b"\r\n\r\n")
    assert (lines(head), body) == (lines(later_head), later_body)
    assert lines(head)[-1] == b"connection: close"
    assert {line.partition(b":")[0] for line in head.split(b"\r\n")} >= {b"date", b"x-request-id", b"retry-after"}


def test_it_counts(crowded: Running) -> None:
    def num_counted() -> float:
        labels = {"route": ASK, "status": "4xx"}
        return crowded.service.metrics.registry.get_sample_value("swaplora_requests_total", labels) or 0

    before = num_counted()
    with full(crowded):
        for _ in range(3):
            told(crowded, LAST)
    assert num_counted() == before + 3


def test_what_has_room_by_then_is_answered(crowded: Running, made: list[object]) -> None:
    with full(crowded, of_all=False):
        for sent in (LAST, FIRST):
            assert told(crowded, sent).startswith(b"HTTP/1.1 429")
        assert b"HTTP/1.1 200" in told(crowded, request(ASK, WANTED | {"model": "sql"}, Connection="close"))
    assert len(made) <= 2  # the first whose body decides is the app's
    assert told(crowded, LAST).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("of_all", [True, False])
def test_one_that_is_not_whole_yet_is_read_at_length(crowded: Running, made: list[object], of_all: bool) -> None:
    with full(crowded, of_all=of_all), connected(crowded.url) as connection:
        connection.sendall(LAST[:40])
        wait_until(lambda: len(made) == 1)
        connection.sendall(LAST[40:])
        assert read_answer(connection)[0] == 429
    assert len(made) == 1


def test_so_is_one_with_another_behind_it(crowded: Running, made: list[object]) -> None:
    with full(crowded), connected(crowded.url) as connection:
        connection.sendall(FIRST + request("/version", method="GET") + FIRST)
        assert [read_answer(connection)[0] for _ in range(3)] == [429, 200, 429]
        connection.sendall(FIRST)
        assert read_answer(connection)[0] == 429
    assert len(made) == 1


def test_two_are_not_taken_for_one(crowded: Running) -> None:
    begin, end = ASK[:3], ASK[3:]
    with full(crowded), connected(crowded.url) as connection:
        connection.sendall(request(begin, WANTED) + request(end, WANTED))
        assert [read_answer(connection)[0] for _ in range(2)] == [404, 404]


def test_and_one_that_is_large(crowded: Running) -> None:
    with full(crowded):
        large = request(ASK, WANTED | {"user": "x" * MAX_HEAD_BYTES}, Connection="close")
        assert told(crowded, large).startswith(b"HTTP/1.1 429")


def test_what_a_client_sends_behind_it_does_not_take_the_answer(crowded: Running, made: list[object]) -> None:
    with full(crowded), connected(crowded.url) as connection:
        connection.sendall(FIRST)
        assert connection.recv(1, socket.MSG_PEEK)  # it is answered
        for _ in range(3):
            connection.sendall(FIRST)
        status, body = read_answer(connection)
        assert (status, connection.recv(1)) == (429, b"")
        assert b"overloaded" in body
    assert not made


# What a head may look like, and what must not be taken for another.
HEADERS = (
    b"Connection: close",
    b"Connection: keep-alive",
    b"Connection: upgrade\r\nUpgrade: h2c",
    b"Expect: 100-continue",
    b"Host: other",
    b"Host: elsewhere.example",
    b"Origin: http://localhost:1",
    b"Origin: http://elsewhere.example",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Content-Length: 3",
    b"Content-Type: text/plain",
    b"X-Request-Id: mine",
    b"X Bad: 1",
    b"X-Empty:",
)
LINES = (
    b"POST /v1/completions HTTP/1.1",
    b"POST /v1/completions HTTP/1.0",
    b"POST /v1/completions?x=1 HTTP/1.1",
    b"POST /v1/%63ompletions HTTP/1.1",
    b"POST http://localhost/v1/completions HTTP/1.1",
    b"POST http://elsewhere.example/v1/completions HTTP/1.1",
    b"POST http://localhost HTTP/1.1",
    b"GET /version HTTP/1.1",
    b"POST /v1/completions HTTP/2.0",
    b"POST  HTTP/1.1",
    b"CONNECT localhost:1 HTTP/1.1",
)


@examples(max_examples=60)
@given(
    line=st.sampled_from(LINES),
    headers=st.lists(st.sampled_from(HEADERS), max_size=3),
    has_host=st.booleans(),
    body=st.sampled_from((b"", b'{"model": "base", "prompt": [5], "max_tokens": 1}', b"{", b'{"model": "sql"}')),
)
def test_it_is_answered_as_later_ones_on_a_connection_are(
    crowded: Running, line: bytes, headers: list[bytes], has_host: bool, body: bytes
) -> None:
    own = [b"Host: localhost"] * has_host
    if any(b"chunked" in header for header in headers):
        content = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\nX-Trailer: 1\r\n\r\n"
    else:
        own, content = [*own, b"Content-Length: %d" % len(body)], body
    sent = b"\r\n".join([line, *own, *headers, b"", b""]) + content
    with full(crowded), connected(crowded.url) as connection:
        connection.sendall(sent)
        first = read_answer(connection)
        assert first == told_later(crowded, sent)


# Connections that cannot be accepted, and that linger.


class Listener:
    """A socket at which a connection arrives when there are files for it again."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.client, self.connection = socket.socketpair()
        self._theirs.send(b"x")
        self.num_asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ours, name)

    def setsockopt(self, *_option: int) -> None:
        pass

    def accept(self) -> tuple[socket.socket, tuple[str, int, int, int]]:
        self.num_asked += 1
        if self.num_asked < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        if not self.ours.recv(1):
            raise BlockingIOError
        self.ours.setblocking(False)
        return self.connection, ("::1", 1, 0, 0)

    def close(self) -> None:
        for one in (self.ours, self._theirs, self.client, self.connection):
            one.close()


class Told(BoundedHttpProtocol):
    """A protocol that does nothing but say when it is to end."""

    def __init__(self) -> None:
        self.has_ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        pass

    def data_received(self, data: bytes) -> None:
        pass

    def connection_lost(self, exc: Exception | None) -> None:
        pass

    def shutdown(self) -> None:
        self.has_ended.set()


def test_who_was_accepted_as_the_server_began_to_end_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what cannot be looked at is handed on as all else."""
    monkeypatch.setattr(server, "_LATE_SECONDS", 0.01)
    made: list[Told] = []

    class First:
        def refuse(self, *_new: object) -> bool:
            raise ValueError("planted")

        def close(self) -> None:
            pass

    def protocol() -> Told:
        made.append(Told())
        return made[-1]

    async def accept() -> None:
        first: Any = First()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            acceptor = Acceptor(listener, first, protocol)
            with socket.create_connection(listener.getsockname()) as client:
                client.sendall(FIRST)
                while not acceptor._handed_on:  # noqa: SLF001 - in the same turn of the loop as it is accepted
                    acceptor._accept()  # noqa: SLF001
                acceptor.close()
                async with asyncio.timeout(30):
                    while not made:
                        await asyncio.sleep(0)
                    await made[0].has_ended.wait()

    asyncio.run(accept())


def test_where_no_file_is_left_it_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_FULL_SECONDS", 0.01)
    listener = Listener()
    accepted: list[socket.socket] = []

    class First:
        def refuse(self, connection: socket.socket, address: tuple[str, int]) -> bool:
            assert address == ("::1", 1)
            accepted.append(connection)
            return True

        def close(self) -> None:
            pass

    async def accept() -> None:
        first: Any = First()
        taking: Any = listener
        acceptor = Acceptor(taking, first, Told)
        while not accepted:
            await asyncio.sleep(0)
        acceptor.close()

    began = time.monotonic()
    asyncio.run(accept())
    assert time.monotonic() - began >= 0.02
    assert accepted == [listener.connection]
    assert 3 <= listener.num_asked <= 4
    listener.close()


def test_few_linger_and_not_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering, "MAX_LINGERING", 2)
    monkeypatch.setattr(lingering, "LINGER_SECONDS", 0.01)

    def is_open(connection: socket.socket) -> bool:
        return connection.fileno() >= 0

    async def linger(check: Callable[[Lingering, list[socket.socket]], Any]) -> None:
        left, pairs = Lingering(), [socket.socketpair() for _ in range(3)]
        ours = [one for one, _ in pairs]
        for one, other in pairs:
            left.add(one)
            assert other.recv(1) == b""  # it is told at once
        assert [is_open(one) for one in ours] == [False, True, True]
        if check is not None:
            check(left, ours)
        async with asyncio.timeout(30):
            while any(map(is_open, ours)):
                await asyncio.sleep(0)
        for _, other in pairs:
            other.close()

    asyncio.run(linger(lambda left, _ours: left.close_all()))
    began = time.monotonic()
    asyncio.run(linger(lambda _left, _ours: None))
    assert time.monotonic() - began >= 0.01


def test_a_client_that_has_gone_is_nobody_s_trouble(crowded: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[bool] = []
    refuse = FirstRequests.refuse

    def noted(first: FirstRequests, connection: socket.socket, address: tuple[str, int]) -> bool:
        refused.append(refuse(first, connection, address))
        return refused[-1]

    monkeypatch.setattr(FirstRequests, "refuse", noted)
    with full(crowded):
        for _ in range(5):
            with connected(crowded.url) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # closing resets
                connection.sendall(LAST)
        assert told(crowded, LAST).startswith(b"HTTP/1.1 429")
    assert refused[-1]
