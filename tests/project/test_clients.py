"""`make clients`: what it hears, how it judges, and the table that it has written. It runs by hand, for it installs."""

import json
import socket
import threading
from typing import Any

import httpx
import pytest

from environments import CLIENTS, SCRIPTS
from judge import FEATURES, NONE, NOT_RUN, YES, Cell, WrongError, judge_answer, judge_feature
from page import Row, in_page, table
from repository import ROOT
from wiretap import Heard, requests, tapped

CHAT = "/v1/chat/completions"


def test_every_client_is_in_the_table_and_none_failed() -> None:
    lines = in_page().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert head == ["client", "version", *FEATURES]
    assert [row[:2] for row in rows] == [[client.name, client.version] for client in CLIENTS]
    assert {word for row in rows for word in row[2:]} <= {YES, NONE}
    assert all(YES in row for row in rows)


def test_a_table_keeps_the_rows_of_clients_that_were_not_run() -> None:
    first, second = (Row(client, dict.fromkeys(FEATURES, Cell(YES, "not told"))) for client in CLIENTS[:2])
    before = table([first])
    assert before.splitlines()[-1] == f"| openai-python | {CLIENTS[0].version} |{f' {YES} |' * len(FEATURES)}"
    assert table([second], before) == table([second, first])
    again = Row(CLIENTS[0], dict.fromkeys(FEATURES, Cell(NOT_RUN)))
    assert table([again], table([first, second])) == table([again, second])
    assert table([first], before.replace(CLIENTS[0].version, "0.0.1")) == before


def test_every_script_is_of_a_client_that_is_pinned() -> None:
    scripts = {file.name for file in SCRIPTS.glob("ask_*")}
    assert {client.script for client in CLIENTS} == scripts
    assert all(client.version[0].isdigit() for client in CLIENTS)
    environments = ROOT / ".clients"
    assert len({client.folder for client in CLIENTS}) == len(CLIENTS)
    assert {client.folder.parent for client in CLIENTS} == {environments}


def test_requests_are_read_out_of_the_bytes_of_a_connection() -> None:
    body = json.dumps({"model": "sql"}).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    get = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    assert list(requests(post + get + post)) == 2 * [Heard("/v1/completions", {"model": "sql"})]
    with pytest.raises(ValueError, match="chunks"):
        list(requests(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"))


def test_a_wiretap_passes_bytes_on_as_they_are() -> None:
    sent = b"POST /x HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"
    answered = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_answer_once, args=(server, len(sent), answered))
        thread.start()
        with (
            tapped(server.getsockname()[1]) as tap,
            socket.create_connection(("127.0.0.1", httpx.URL(tap.url).port)) as client,
        ):
            client.sendall(sent)
            assert client.recv(len(answered), socket.MSG_WAITALL) == answered
            assert tap.take() == ([Heard("/x", {})], [200])
            assert tap.take() == ([], [])
        thread.join()


def test_what_a_client_says_is_held_against_the_same_request_by_hand() -> None:
    asked = Heard(CHAT, {"model": "sql", "stream": True})
    assert _judged("streaming", ["a", "b"], asked) == "ab"
    assert _judged("chat", "ab", asked) == "ab"
    for told, heard, words in (
        ("ac", [asked], "by hand 'ab'"),
        ("ab", [asked, asked], "2 requests"),
        ("ab", [], "0 requests"),
        ("ab", [Heard(CHAT, {"model": "base"})], "asked 'base'"),
    ):
        with pytest.raises(WrongError, match=words):
            _judged("chat", told, *heard)
    with pytest.raises(WrongError, match="no stream"):
        _judged("streaming", ["ab"], asked)
    with pytest.raises(WrongError, match="answered"):
        _judged("chat", "ab", asked, statuses=[503, 200])


def test_documents_are_held_by_their_places_and_scores() -> None:
    asked = Heard("/v2/rerank", {"model": "sql"})
    results = [{"index": 1, "relevance_score": 0.5}, {"index": 0, "relevance_score": 0.25}]
    answer = httpx.Response(200, json={"results": results})
    assert _judged("rerank", [[1, 0.5], [0, 0.25]], asked, by_hand=answer) == [[1, 0.5], [0, 0.25]]
    with pytest.raises(WrongError, match="by hand"):
        _judged("rerank", [[0, 0.5], [1, 0.25]], asked, by_hand=answer)


def test_nothing_may_be_refused() -> None:
    asked = Heard("/v1/embeddings", {"model": "sql"})
    refusal = httpx.Response(404, json={"error": {"message": "not served yet"}})
    with pytest.raises(WrongError, match=r"refused: .*not served yet"):
        _judged("embeddings", None, asked, by_hand=refusal, error="NotFoundError: not served yet")


def test_an_adapter_that_says_what_the_base_says_has_failed() -> None:
    assert judge_feature({"base": "a", "sql": "b", "json": "b"}, "base").word == YES
    failed = judge_feature({"base": "a", "sql": "b", "json": "a"}, "base")
    assert (failed.word, "json said" in failed.note) == ("FAILED", True)


def _judged(
    feature: str,
    told: Any,
    *heard: Heard,
    statuses: list[int] | None = None,
    by_hand: httpx.Response | None = None,
    error: str = "",
) -> Any:
    """By a server that says "ab", unless it is told to say something else."""
    message = {"choices": [{"message": {"content": "ab"}, "logprobs": None}]}
    answer = by_hand or httpx.Response(200, json=message)
    with httpx.Client(base_url="http://server", transport=httpx.MockTransport(lambda _request: answer)) as server:
        said = {"error": error} if error else {"told": told}
        return judge_answer(server, feature, "sql", said, list(heard), statuses or [200])


def _answer_once(server: socket.socket, num_bytes: int, answer: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(num_bytes, socket.MSG_WAITALL)
        connection.sendall(answer)
        connection.recv(1)  # until the client has gone
