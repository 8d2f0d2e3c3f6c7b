"""Words of a server, a model or a file are shown on a terminal and never obeyed by it."""

import json
import unicodedata
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_server import CARD, FakeServer, run_fake_server, swaplora
from swaplora_server.printable import printable

EVIL = "a\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\r\u202eb"
SHOWN = "a�]0;owned��[2J�31m���b"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with run_fake_server() as fake:
        monkeypatch.setenv("SWAPLORA_URL", fake.url)
        yield fake


@given(st.text() | st.text(alphabet="\x00\x1b\x9b\r\n\t\ud800a😀\u200d"))
def test_a_text_keeps_its_length_and_loses_its_controls(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    shown.encode()
    for before, after in zip(text, shown, strict=True):
        assert after == before or after == "\ufffd"
        assert after in "\n\t" or unicodedata.category(after) not in ("Cc", "Cs")
    if not any(unicodedata.category(char) in ("Cc", "Cs", "Cf") for char in text):
        assert shown == text


def chunk(text: str) -> str:
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"


def test_what_a_model_says_is_not_obeyed(server: FakeServer) -> None:
    # an escape sequence may come in pieces
    pieces = "".join(map(chunk, ["x\x1b", "[31mred\n\ty"]))
    server.answer("POST", "/v1/chat/completions", pieces + "data: [DONE]\n\n")
    assert swaplora("chat", "sql", "-m", "hi").output == "x�[31mred\n\ty\n"


@pytest.mark.parametrize("field", ["message", "code"])
def test_an_error_is_not_obeyed(server: FakeServer, field: str) -> None:
    error = {"message": "no", "code": "engine_failed"} | {field: EVIL}
    server.answer("POST", "/v1/chat/completions", {"error": error}, 400)
    refused = swaplora("chat", "sql", "-m", "hi")
    server.answer("POST", "/v1/chat/completions", f"data: {json.dumps({'error': error})}\n\n")
    for said in (refused.output, swaplora("chat", "sql", "-m", "hi").output):
        assert said == printable(said)
        assert "owned" in said


COMMANDS = {
    ("adapters", "list"): ("GET", "/v1/adapters"),
    ("adapters", "get", "sql"): ("GET", "/v1/adapters/sql"),
    ("adapters", "inspect", "sql"): ("GET", "/v1/adapters/sql/inspect"),
    ("adapters", "rollback", "sql", "--to", "1"): ("PATCH", "/v1/adapters/sql"),
    ("adapters", "compose", "new", "sql"): ("POST", "/v1/merged"),
    ("adapters", "put", "sql", "hf://a/b"): ("PUT", "/v1/adapters/sql"),
    ("aliases", "list"): ("GET", "/v1/aliases"),
    ("aliases", "set", "prod", "sql"): ("PUT", "/v1/aliases/prod"),
}
ANSWER = {
    **CARD,
    "name": EVIL,
    "version": EVIL,
    "state": EVIL,
    "digest": EVIL,
    "last_failure": {"at": 0, "reason": EVIL},
    EVIL: EVIL,
    "alias": EVIL,
    "target": EVIL,
    "targets": [{"target": EVIL, "weight": 1}],
    "warnings": [EVIL],
    "modules": [{"module": EVIL, "rank": 1, "singular_values": [1.0]}],
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("is_refused", [True, False])
def test_no_command_passes_on_what_a_terminal_would_obey(
    server: FakeServer, command: tuple[str, ...], is_refused: bool
) -> None:
    content = {"error": {"message": EVIL, "code": EVIL}} if is_refused else {**ANSWER, "data": [ANSWER]}
    server.answer(*COMMANDS[command], content, 400 if is_refused else 200)
    done = swaplora(*command)
    assert done.exit_code == is_refused, done.output
    assert "owned" in done.output
    assert done.output == printable(done.output)


def test_a_name_is_shown_with_marks_in_place_of_controls(server: FakeServer) -> None:
    server.answer("GET", "/v1/aliases", {"data": [{"alias": EVIL, "targets": [{"target": "sql@1"}]}]})
    assert SHOWN in swaplora("aliases", "list").output
