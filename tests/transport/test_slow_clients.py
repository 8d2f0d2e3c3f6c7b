"""A client that sends nothing, or reads nothing, loses its connection; its request ends, and nobody else waits."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from raw_http import GUARD_SECONDS, connected, read_answer, read_to_end, request
from serving import BASE, Running, serving, settings
from swaplora_server.engine.scheduling.batch import Batch

SHORT_SECONDS = 0.5
MAX_TOKENS = 480
WAIT_SECONDS = 60
HEALTH = request("/health", method="GET")
TINY_BUFFER = 4096
WANTED = {"model": BASE, "prompt": [1], "max_tokens": 1}
# some ten megabytes of text: more than the system takes between a server and a client that does not read
LARGE = {
    "model": "tuned",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": MAX_TOKENS,
    "ignore_eos": True,
    "logprobs": True,
    "top_logprobs": 20,
    "n": 8,
}


@pytest.fixture(scope="module")
def strict(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that waits for nobody."""
    short = dict.fromkeys(("head_seconds", "keep_alive_seconds", "stall_seconds"), SHORT_SECONDS)
    config = settings(base, tmp_path_factory.mktemp("data"), min_bytes_per_second=1 << 10, **short)
    with serving(config) as running:
        running.put("tuned", adapters[0])
        yield running


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def drip(connection: socket.socket) -> bytes:
    """Send a byte now and then until the server has had enough; what it said."""
    answer = b""
    connection.settimeout(SHORT_SECONDS / 10)
    with suppress(ConnectionError):
        while not answer:
            with suppress(TimeoutError):
                answer = connection.recv(1 << 16)
            connection.sendall(b"a")
    connection.settimeout(GUARD_SECONDS)
    return answer


def said(answer: bytes) -> tuple[int, str]:
    """Status and error code of an answer that ends a connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def staged(server: Running) -> list[Path]:
    return list((server.service.settings.data_dir / "staging").iterdir())


def test_one_that_says_nothing_is_left(strict: Running) -> None:
    with connected(strict.url) as connection:
        assert read_to_end(connection) == b""


def test_half_a_head_is_not_waited_for(strict: Running) -> None:
    with connected(strict.url) as connection:
        connection.sendall(HEALTH[:-3])
        assert said(read_to_end(connection)) == (408, "request_timeout")


def test_a_head_that_drips_is_not_waited_for_either(strict: Running) -> None:
    with connected(strict.url) as connection:
        connection.sendall(HEALTH[:-2] + b"X-Long: ")
        assert said(drip(connection)) == (408, "request_timeout")


@pytest.mark.parametrize("then", [b"", b"\r\n", b"GET /hea"])
def test_a_connection_rests_so_long_and_no_longer(strict: Running, then: bytes) -> None:
    with connected(strict.url) as connection:
        connection.sendall(HEALTH)
        assert read_answer(connection)[0] == 200
        connection.sendall(then)
        left = read_to_end(connection)
        assert (said(left) if left else None) == ((408, "request_timeout") if b"GET" in then else None)


@pytest.mark.parametrize("method_and_path", ["POST /v1/completions", "PUT /v1/adapters/new", "DELETE /v1/adapters/no"])
@pytest.mark.parametrize("does_drip", [False, True])
def test_a_body_that_does_not_come_is_not_waited_for(strict: Running, method_and_path: str, does_drip: bool) -> None:
    """A route that does not read its body answers at once, and closes."""
    method, path = method_and_path.split()
    part = b'--x\r\nContent-Disposition: form-data; name="weights"\r\n\r\nabc'
    kind = "multipart/form-data; boundary=x" if method == "PUT" else "application/json"
    with connected(strict.url) as connection:
        whole = request(path, part, method=method, Content_Type=kind, Content_Length="1000000")
        connection.sendall(whole)
        answer = drip(connection) if does_drip else read_to_end(connection)
        assert said(answer) == ((404, "adapter_not_found") if method == "DELETE" else (408, "request_timeout"))
        read_to_end(connection)
    wait_until(lambda: staged(strict) == [])


def test_a_body_that_is_not_asked_for_ends_the_connection(strict: Running) -> None:
    """Its rest must not be taken for the next request."""
    head = request("/nowhere", b"", Content_Length="100000", Expect="100-continue")
    with connected(strict.url) as connection:
        connection.sendall(head)
        answer = read_to_end(connection)
    assert said(answer) == (404, "not_found")
    with connected(strict.url) as connection:
        connection.sendall(head)
        assert read_answer(connection)[0] == 404
        connection.sendall(b"a" * 100_000 + HEALTH)
        assert read_to_end(connection) == b""


def test_a_client_that_was_not_told_to_go_on_is_waited_for(strict: Running) -> None:
    with connected(strict.url) as connection:
        connection.sendall(request("/v1/completions", b"", Content_Length="40", Expect="100-continue"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(json.dumps(WANTED).encode()[:40].ljust(40))
        assert read_answer(connection)[0] in (200, 400)


@pytest.mark.parametrize("is_streaming", [True, False])
def test_an_answer_that_nobody_reads_is_thrown_away(strict: Running, is_streaming: bool) -> None:
    with connected(strict.url, TINY_BUFFER) as connection:
        connection.sendall(request("/v1/chat/completions", LARGE | {"stream": is_streaming}))
        wait_until(lambda: strict.service.engine.snapshot().num_running > 0)
        strict.wait_idle()
        wait_until(lambda: len(strict.connections) == 0)
        assert strict.client.get("/v1/adapters/tuned").json()["in_flight"] == 0
        assert (b"[DONE]" if is_streaming else b'"usage"') not in read_to_end(connection)


def test_a_stream_ends_when_more_of_it_lies_unread_than_may(
    base: Path, adapters: list[Path], tmp_path: Path, steps: list[Batch]
) -> None:
    with serving(settings(base, tmp_path, max_unread_bytes=64 << 10)) as server:
        server.put("tuned", adapters[0])
        steps.clear()  # a start has steps of its own
        with connected(server.url, TINY_BUFFER) as connection:
            connection.sendall(request("/v1/chat/completions", LARGE | {"stream": True}))
            wait_until(lambda: len(steps) > 0)
            server.wait_idle()
            assert len(steps) < MAX_TOKENS
            assert b"[DONE]" not in read_to_end(connection)
        assert server.client.get("/v1/adapters/tuned").json()["in_flight"] == 0
        assert 'outcome="abandoned"} 1.0' in server.client.get("/metrics").text


def test_an_answer_that_is_read_comes_whole_however_large(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, max_unread_bytes=64 << 10)) as server:
        server.put("tuned", adapters[0])
        answer = server.client.post("/v1/chat/completions", json=LARGE | {"n": 2})
        assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["length"] * 2


@pytest.fixture(scope="module")
def narrow(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with room for four connections."""
    with serving(settings(base, tmp_path_factory.mktemp("data"), max_connections=4)) as running:
        running.client.close()
        wait_until(lambda: len(running.connections) == 0)
        yield running


def hold(server: Running, stack: ExitStack, start: bytes, count: int) -> list[socket.socket]:
    """So many connections, each of which has sent `start`, in an order that the server knows."""
    held = []
    for _ in range(count):
        expected = min(len(server.connections) + 1, 4)
        held.append(stack.enter_context(connected(server.url)))
        held[-1].sendall(start)
        wait_until(lambda expected=expected: len(server.connections) == expected)  # type: ignore[misc]
    return held


@pytest.mark.parametrize("start", [b"", HEALTH[:-3]], ids=["silent", "half a head"])
def test_those_that_say_nothing_make_room(narrow: Running, start: bytes) -> None:
    with ExitStack() as stack:
        silent = hold(narrow, stack, start, 4)
        for number in range(3):
            with connected(narrow.url) as connection:
                connection.sendall(request("/v1/completions", WANTED))
                assert read_answer(connection)[0] == 200
                assert read_to_end(silent[number]) == b""
                connection.shutdown(socket.SHUT_RDWR)
            hold(narrow, stack, start, 1)
    wait_until(lambda: len(narrow.connections) == 0)


def test_those_that_rest_make_room_after_those_that_say_nothing(narrow: Running) -> None:
    with ExitStack() as stack:
        resting = hold(narrow, stack, HEALTH, 3)
        for connection in resting:
            assert read_answer(connection)[0] == 200
        (silent,) = hold(narrow, stack, b"", 1)
        for gone in (silent, resting[0]):
            hold_at_work(narrow, stack)
            assert read_to_end(gone) == b""
        resting[1].sendall(HEALTH)
        assert read_answer(resting[1])[0] == 200
    wait_until(lambda: len(narrow.connections) == 0)


def hold_at_work(server: Running, stack: ExitStack) -> socket.socket:
    """A connection whose request the server is working on: its body is not here yet."""
    connection = stack.enter_context(connected(server.url))
    connection.sendall(request("/v1/completions", b"{", Content_Length="1000", Expect="100-continue"))
    assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    return connection


def test_where_all_are_at_work_a_new_one_is_told_so_at_once(narrow: Running) -> None:
    with ExitStack() as stack:
        working = [hold_at_work(narrow, stack) for _ in range(4)]
        with connected(narrow.url) as connection:
            assert said(read_to_end(connection)) == (503, "too_many_connections")
        working[0].sendall(json.dumps(WANTED).encode()[1:].ljust(999))
        assert read_answer(working[0])[0] == 200
    wait_until(lambda: len(narrow.connections) == 0)
