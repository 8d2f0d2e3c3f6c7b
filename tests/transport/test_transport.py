"""What comes over a connection is read as one way only, in its order, and answered in the form that it was asked in."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from raw_http import connected, read_answer, read_to_end, request
from serving import BASE, Running, settings
from swaplora_server.engine.scheduling.batch import Batch
from swaplora_server.http.transport.heads import MAX_HEAD_BYTES, MAX_HEADERS
from swaplora_server.http.transport.protocol import MAX_PIPELINED

WANTED = {"model": BASE, "prompt": [1], "max_tokens": 1}
CONTENT = json.dumps(WANTED).encode()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(CONTENT), CONTENT)
ASK = "/v1/completions"
HEALTH = request("/health", method="GET")


def tell(server: Running, *pieces: bytes) -> bytes:
    """What the server says to `pieces` before it closes the connection."""
    with connected(server.url) as connection:
        with suppress(ConnectionError):  # it may hang up while we still send
            for piece in pieces:
                connection.sendall(piece)
        return read_to_end(connection)


def refused(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: 3",
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: identity",
        "Content-Length : 1",
        "Content-Length:\r\n 1",
        "Host: other",
        "X-Nul: a\0b",
    ],
)
def test_a_head_with_two_meanings_is_refused(server: Running, head: str) -> None:
    whole = request(ASK, WANTED).replace(b"\r\n\r\n", f"\r\n{head}\r\n\r\n".encode(), 1)
    assert refused(tell(server, whole)) == (400, "invalid_request")


@pytest.mark.parametrize("coding", ["gzip, chunked", "xchunked", "chunked, identity", "chunked;q=1", "identity"])
def test_only_one_transfer_coding_is_known(server: Running, coding: str) -> None:
    head = request(ASK, b"", Transfer_Encoding=coding).replace(b"Content-Length: 0\r\n", b"")
    assert refused(tell(server, head + CHUNKED)) == (400, "invalid_request")


@pytest.mark.parametrize("length", ["+5", "5, 5", "-1", "0x5", "5 5", "99999999999999999999"])
def test_a_length_is_a_number(server: Running, length: str) -> None:
    assert refused(tell(server, request(ASK, b"aaaaa", Content_Length=length))) == (400, "invalid_request")


@pytest.mark.parametrize(
    "line", [b"GET /health HTTP/1.1", b"CONNECT a:1 HTTP/1.1\r\nHost: x", b"PRI * HTTP/2.0\r\n\r\nSM", b"\x16\x03\x01"]
)
def test_what_this_server_does_not_speak_is_refused(server: Running, line: bytes) -> None:
    assert refused(tell(server, line + b"\r\n\r\n")) == (400, "invalid_request")


def test_a_chunked_body_is_read_and_its_trailer_is_no_header(server: Running) -> None:
    head = request(ASK, b"", Transfer_Encoding="chunked", Connection="close").replace(b"Content-Length: 0\r\n", b"")
    trailer = CHUNKED[:-2] + b"X-Request-Id: from-the-trailer\r\n\r\n"
    answer = tell(server, head + trailer)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"from-the-trailer" not in answer


@pytest.mark.parametrize("start", [CHUNKED[:-2] + b"X-Long: ", b"1;ext=", b""])
def test_nothing_without_an_end_is_kept(server: Running, start: bytes) -> None:
    head = request(ASK, b"", Transfer_Encoding="chunked").replace(b"Content-Length: 0\r\n", b"")
    before = head + start if start else head[:-2] + b"X-Long: "
    answer = tell(server, before, *[b"a" * (64 << 10)] * 64)
    assert answer == b"" or refused(answer) == (431, "headers_too_large")


def test_a_head_has_so_many_headers_and_bytes_at_most(server: Running) -> None:
    few = {f"X-{number}": "a" for number in range(MAX_HEADERS - 3)}
    with connected(server.url) as connection:
        connection.sendall(request("/health", method="GET", **few))
        assert read_answer(connection)[0] == 200
    assert refused(tell(server, request("/health", method="GET", **few, X="a"))) == (431, "headers_too_large")
    assert refused(tell(server, request("/" + "a" * MAX_HEAD_BYTES, method="GET"))) == (431, "headers_too_large")


@pytest.mark.parametrize("is_streaming", [True, False])
def test_an_answer_in_http_1_0_ends_with_the_connection(server: Running, is_streaming: bool) -> None:
    answer = tell(server, request(ASK, WANTED | {"stream": is_streaming}, version="1.0"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    if is_streaming:
        lines = body.decode().split("\n\n")
        assert all(line.startswith("data: ") for line in lines[:-1])
        assert lines[-2:] == ["data: [DONE]", ""]
    else:
        assert json.loads(body)["usage"]["total_tokens"] == 2


def test_one_that_may_close_is_closed_after_its_answer(server: Running) -> None:
    answer = tell(server, request(ASK, WANTED, Connection="close") + HEALTH)
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "TLS/1.0"])
def test_a_wish_for_another_protocol_is_ignored_and_its_body_read(server: Running, upgrade: str) -> None:
    """Clients of the JVM ask for HTTP/2 so; what follows the head must not be taken for the next request."""
    wishes = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": upgrade, "HTTP2-Settings": "AAMAAABkAARAAAAA"}
    whole = request(ASK, WANTED, **wishes)
    with connected(server.url) as connection:
        for pieces in ([whole], [whole[: -len(CONTENT)], CONTENT], [whole + whole[:40], whole[40:]]):
            for piece in pieces:
                connection.sendall(piece)
            for _ in range(2 if len(pieces[0]) > len(whole) else 1):
                status, body = read_answer(connection)
                assert (status, json.loads(body)["usage"]["total_tokens"]) == (200, 2)
    answer = tell(server, request(ASK, WANTED, **wishes | {"Connection": "upgrade, close"}))
    assert answer.startswith(b"HTTP/1.1 200 OK")


def test_a_whole_address_names_the_host(server: Running) -> None:
    with connected(server.url) as connection:
        connection.sendall(request("http://localhost:8000/health", method="GET", Host="evil.example"))
        assert read_answer(connection)[0] == 200
        connection.sendall(request("http://evil.example/health", method="GET"))
        assert read_answer(connection)[0] == 421


def test_requests_behind_a_large_body_are_answered_in_their_order(server: Running) -> None:
    """The head's bound counts no body, wherever the network cuts."""
    large = request(ASK, CONTENT + b" " * 200_000)
    with connected(server.url) as connection:
        for cut in (1, 20, len(HEALTH) - 1):
            connection.sendall(large + HEALTH + HEALTH[:cut])
            assert json.loads(read_answer(connection)[1])["usage"]["total_tokens"] == 2
            assert read_answer(connection) == (200, b'{"status":"ok"}')
            connection.sendall(HEALTH[cut:])
            assert read_answer(connection) == (200, b'{"status":"ok"}')


def test_so_many_requests_may_wait_for_the_answers_before_them(server: Running) -> None:
    with connected(server.url) as connection:
        connection.sendall(HEALTH * MAX_PIPELINED)
        assert [read_answer(connection)[0] for _ in range(MAX_PIPELINED)] == [200] * MAX_PIPELINED
    assert tell(server, HEALTH * 5000).count(b"HTTP/1.1 200") < 5000


@pytest.mark.parametrize("comes_together", [True, False])
def test_a_client_that_goes_is_noticed_behind_a_pipelined_request(
    server: Running, comes_together: bool, steps: list[Batch]
) -> None:
    long: dict[str, Any] = WANTED | {"max_tokens": 480, "n": 4, "ignore_eos": True}
    with connected(server.url) as connection:
        connection.sendall(request(ASK, long) + (HEALTH if comes_together else b""))
        while server.service.engine.snapshot().num_running < 4:
            time.sleep(0.005)
        if not comes_together:
            connection.sendall(HEALTH)
    server.wait_idle()
    assert len(steps) < 480


def test_a_client_that_goes_is_noticed_behind_a_large_body_that_waits(server: Running, steps: list[Batch]) -> None:
    long: dict[str, Any] = WANTED | {"max_tokens": 480, "n": 4, "ignore_eos": True}
    with connected(server.url) as connection:
        connection.sendall(request(ASK, long))
        while server.service.engine.snapshot().num_running < 4:
            time.sleep(0.005)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with suppress(OSError):  # it may be closed before it has all
            connection.sendall(head + b"Content-Length: 10000000\r\n\r\n" + bytes(3_000_000))
    server.wait_idle()
    assert len(steps) < 480


def test_what_cannot_be_read_ends_a_stream_and_is_not_written_into_it(server: Running) -> None:
    long = WANTED | {"max_tokens": 480, "ignore_eos": True, "stream": True}
    with connected(server.url) as connection:
        connection.sendall(request(ASK, long))
        received = connection.recv(1 << 16)
        connection.sendall(b"no HTTP at all\r\n\r\n")
        received += read_to_end(connection)
    assert received.count(b"HTTP/1.1 ") == 1
    server.wait_idle()


def test_connections_are_kept_for_longer_than_proxies_keep_theirs(tmp_path: Path) -> None:
    assert settings(tmp_path, tmp_path).keep_alive_seconds > 90


def test_an_early_answer_reaches_a_client_that_sends_its_whole_body_first(server: Running) -> None:
    with connected(server.url) as connection:
        connection.sendall(request("/nowhere", b"a" * (16 << 20)))  # nothing breaks this off
        assert read_answer(connection)[0] == 404
        assert read_to_end(connection) == b""
