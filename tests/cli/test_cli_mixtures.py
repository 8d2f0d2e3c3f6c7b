"""`swaplora mixtures`: what is sent, what is shown."""

import json
from collections.abc import Iterator

import pytest

from fake_server import FakeServer, run_fake_server, swaplora

BOTH = {"object": "mixture", "name": "both", "members": ["sql", "json@2"], "top_k": 2, "temperature": 0.5}
TRACE = {
    "members": ["sql@1", "json@2"],
    "tokens": [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}],
    "modules": [
        {"module": "layers.0.q", "layer": 0, "members": [[0, 1], [1, 0]], "shares": [[0.75, 0.25], [1.0, 0.0]]},
        {"module": "layers.0.k", "layer": 0, "members": [[0, 1], [0, 1]], "shares": [[0.75, 0.25], [0.5, 0.5]]},
        {"module": "lm_head", "layer": None, "members": [[1, 0], [1, 0]], "shares": [[1.0, 0.0], [1.0, 0.0]]},
    ],
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with run_fake_server() as fake:
        monkeypatch.setenv("SWAPLORA_URL", fake.url)
        yield fake


def test_list_shows_members(server: FakeServer) -> None:
    server.answer("GET", "/v1/mixtures", {"object": "list", "data": [BOTH]})
    rows = [line.split() for line in swaplora("mixtures", "list").output.splitlines()]
    assert rows == [["mixture", "members", "top_k", "temperature"], ["both", "sql", "json@2", "2", "0.5"]]
    assert json.loads(swaplora("mixtures", "list", "--json").output) == [BOTH]


def test_create_sends_what_was_asked(server: FakeServer) -> None:
    server.answer("POST", "/v1/mixtures", BOTH)
    command = ["mixtures", "create", "both", "sql", "json@2", "--top-k", "2", "--temperature", "0.5"]
    done = swaplora(*command)
    assert (done.exit_code, done.stdout) == (0, "both mixes sql json@2\n")
    assert server.bodies == [{"name": "both", "members": ["sql", "json@2"], "top_k": 2, "temperature": 0.5}]
    assert json.loads(swaplora(*command, "--json").stdout) == BOTH


def test_delete_says_that_it_did_or_why_not(server: FakeServer) -> None:
    server.answer("DELETE", "/v1/mixtures/both", {})
    assert swaplora("mixtures", "delete", "both").stdout == "both is deleted\n"
    server.refuse("DELETE", "/v1/mixtures/none", 404, "there is no mixture none", "mixture_not_found")
    done = swaplora("mixtures", "delete", "none")
    assert (done.exit_code, done.stderr) == (1, "swaplora: there is no mixture none (mixture_not_found)\n")


def test_a_trace_is_a_mean_by_layer(server: FakeServer) -> None:
    server.answer("POST", "/v1/mixtures/both/trace", TRACE)
    rows = [line.split() for line in swaplora("mixtures", "trace", "both", "ab").output.splitlines()]
    assert rows == [["layer", "sql@1", "json@2"], ["0", "50%", "50%"], ["lm_head", "0%", "100%"]]
    assert server.bodies == [{"prompt": "ab"}]
    assert json.loads(swaplora("mixtures", "trace", "both", "ab", "--json").output) == TRACE
