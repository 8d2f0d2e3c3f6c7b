"""`swaplora chat`, with one message and as a conversation on a terminal."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import swaplora_server
from fake_server import FakeServer, run_fake_server, swaplora

MODELS = {"data": [{"id": "base", "parent": None}, {"id": "sql", "parent": "base"}]}
RUN = "from swaplora_server.cli import main; main()"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with run_fake_server() as fake:
        monkeypatch.setenv("SWAPLORA_URL", fake.url)
        yield fake


def stream(*texts: str, end: str = "data: [DONE]\n\n") -> str:
    chunks = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    chunks += [{"choices": [{"delta": {"content": text}}]} for text in texts]
    chunks += [{"choices": []}]
    return ": ping\n\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def asked(server: FakeServer) -> list[list[dict[str, str]]]:
    """The conversation in each chat request."""
    return [json.loads(call.body)["messages"] for call in server.calls if call.method == "POST"]


def test_chat_says_one_message_to_the_base(server: FakeServer) -> None:
    server.answer("GET", "/v1/models", MODELS)
    server.answer("POST", "/v1/chat/completions", stream("Par", "is."))
    done = swaplora("chat", "--message", "Capital of France?")
    assert (done.exit_code, done.output) == (0, "Paris.\n")
    assert json.loads(server.calls[-1].body) == {
        "model": "base",
        "messages": [{"role": "user", "content": "Capital of France?"}],
        "stream": True,
    }


def test_chat_takes_piped_text_as_one_message(server: FakeServer) -> None:
    server.answer("POST", "/v1/chat/completions", stream("ok"))
    assert swaplora("chat", "sql@2", stdin="two\nlines\n").output == "ok\n"
    assert json.loads(server.calls[0].body)["model"] == "sql@2"
    assert asked(server) == [[{"role": "user", "content": "two\nlines\n"}]]


@pytest.mark.parametrize(
    ("end", "complaint"),
    [
        (
            'data: {"error": {"message": "bad row", "code": "engine_failed"}}\n\ndata: [DONE]\n\n',
            "bad row (engine_failed)",
        ),
        ("", "the answer broke off: the server ended the stream early"),
    ],
)
def test_an_answer_that_fails_midway_is_not_taken_for_whole(server: FakeServer, end: str, complaint: str) -> None:
    server.answer("POST", "/v1/chat/completions", stream("Par", end=end))
    done = swaplora("chat", "sql", "-m", "hi")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "Par", f"swaplora: {complaint}\n")


def test_chat_refused_before_the_stream(server: FakeServer) -> None:
    server.refuse("POST", "/v1/chat/completions", 404, "no model x", "model_not_found")
    assert swaplora("chat", "x", "-m", "hi").stderr == "swaplora: no model x (model_not_found)\n"


def converse(typed: str) -> str:
    """What a person at a terminal sees who starts `swaplora chat` and types this."""
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    with subprocess.Popen(
        [sys.executable, "-c", RUN, "chat"],
        cwd=Path(swaplora_server.__file__).parents[1],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as chat:
        shown, _ = chat.communicate(timeout=60)
    os.close(theirs)
    os.close(ours)
    return shown


def test_a_conversation_remembers_until_it_is_reset(server: FakeServer) -> None:
    server.answer("GET", "/v1/models", MODELS)
    server.answer("POST", "/v1/chat/completions", stream("yes"))
    shown = converse("one\n/model sql\n\ntwo\n/reset\nthree\n/models\n/what\n/quit\n")
    one, two, three = ({"role": "user", "content": text} for text in ("one", "two", "three"))
    yes = {"role": "assistant", "content": "yes"}
    assert asked(server) == [[one], [one, yes, two], [three]]
    assert [json.loads(call.body)["model"] for call in server.calls if call.method == "POST"] == ["base", "sql", "sql"]
    assert "base\nsql\n" in shown
    assert "The commands are /model NAME" in shown


def test_a_refused_turn_leaves_the_conversation_as_it_was(server: FakeServer) -> None:
    server.answer("GET", "/v1/models", MODELS)
    server.refuse("POST", "/v1/chat/completions", 429, "try later", "overloaded")
    shown = converse("one\ntwo\n\x04")
    assert shown.count("swaplora: try later (overloaded)") == 2
    assert asked(server) == [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
