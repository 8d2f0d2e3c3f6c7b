"""Whatever a client's text holds, each line of the log is one that the server began."""

import itertools
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from serving import BASE, Running, settings
from swaplora_server.engine.runner import Runner
from swaplora_server.log_lines import configure_logging, visible

# each would begin a line of its own somewhere, or move a cursor
HOSTILE = "/x\n\r\x0b\x0c\x1b[2K\x1c\x1d\x85\u2028\u2029\u202e\x9b2K\ud8002026-01-01 [error] forged"

UNQUOTED = "/x\x1b[2K\x85\u2028forged"


@contextmanager
def logging_set_up(folder: Path, **fields: Any) -> Iterator[None]:
    """As the server sets it up; taken back at the end."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # else nothing would be set up
    chosen = settings(folder, folder, **fields)
    configure_logging(chosen.log_level, as_json=chosen.log_json)
    try:
        yield
    finally:
        structlog.reset_defaults()
        root.handlers[:], root.level = handlers, level


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = capsys.readouterr().err
    assert text.endswith("\n")
    assert all(char.isprintable() or char == "\n" for char in text)
    return text[:-1].split("\n")


@pytest.mark.parametrize("is_json", [False, True])
def test_a_clients_text_stays_in_its_line(is_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_set_up(tmp_path, log_json=is_json):
        structlog.get_logger().warning("refused", path=HOSTILE, name=UNQUOTED)
    (line,) = lines(capsys)
    assert "refused" in (json.loads(line)["event"] if is_json else line)


@pytest.mark.parametrize("is_json", [False, True])
def test_a_traceback_begins_no_line_with_a_clients_text(
    is_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_set_up(tmp_path, log_json=is_json):
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            structlog.get_logger().exception("a request failed", path="/x")
    first, *rest = lines(capsys)
    assert "a request failed" in first
    assert all(line.startswith("    ") for line in rest)
    assert bool(rest) is not is_json


def test_what_libraries_log_is_told_in_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_set_up(tmp_path):
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logging.getLogger("library").exception("cannot read %s", HOSTILE)
    first, *rest = lines(capsys)
    assert first.startswith("ERROR library: cannot read /x")
    assert all(line.startswith("    ") for line in rest)


Line = dict[str, Any]
PROMPT = {"messages": [{"role": "user", "content": "a word that no log has"}], "max_tokens": 400, "ignore_eos": True}


def told(capsys: pytest.CaptureFixture[str], number: int) -> list[Line]:
    """So many lines of requests, the last of which may be written a moment after its answer."""
    found: list[Line] = []
    while len(found) < number:
        found += [line for line in map(json.loads, capsys.readouterr().err.splitlines()) if line["event"] == "request"]
        time.sleep(0.005)
    return found


def test_each_request_is_one_line(
    server: Running,
    adapters: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, goes_on = server.client, threading.Event()
    with logging_set_up(tmp_path, log_json=True, log_level="info"):
        assert server.put("logged", adapters[0]).status_code == 201
        client.get("/health/ready")
        body: Line = {**PROMPT, "model": "logged", "max_tokens": 3, "n": 2}
        client.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "mine"})
        client.post("/v1/chat/completions", json=body | {"stream": True, "model": BASE, "n": 1})
        client.post("/v1/chat/completions", json=body | {"model": HOSTILE.encode(errors="replace").decode()})
        run, steps = Runner.run, itertools.count()
        monkeypatch.setattr(Runner, "run", lambda *asked: (not next(steps) or goes_on.wait(60)) and run(*asked))
        with client.stream("POST", "/v1/chat/completions", json=PROMPT | {"model": "logged", "stream": True}) as left:
            next(left.iter_lines())
        client.get("/nowhere")
        lines = told(capsys, 6)
        goes_on.set()
    put, whole, stream, unknown, *others = lines
    abandoned, nowhere = sorted(others, key=lambda line: line["route"] == "none")
    who = {"level": "info", "event": "request", "method": "POST", "tenant": "default", "key": "none"}
    assert all(line.items() >= (who | {"method": line["method"]}).items() for line in lines if line is not nowhere)
    assert (put["method"], put["route"], put["status"]) == ("PUT", "/v1/adapters/{name}", 201)
    assert whole.keys() - who.keys() == {
        *("timestamp", "request_id", "route", "status", "adapter", "version", "prompt_tokens", "output_tokens"),
        *("queue_seconds", "first_token_seconds", "seconds", "finish_reason"),
    }
    assert (whole["request_id"], whole["adapter"], whole["version"], whole["status"]) == ("mine", "logged", "1", 200)
    assert (whole["output_tokens"], whole["finish_reason"]) == (6, "length")
    assert 0 <= whole["queue_seconds"] <= whole["first_token_seconds"] <= whole["seconds"]
    assert (stream["output_tokens"], stream["prompt_tokens"]) == (3, whole["prompt_tokens"])
    assert not stream.keys() & {"adapter", "version"}, "the base is no adapter"
    assert (unknown["status"], unknown["error"]) == (404, "model_not_found")
    assert (abandoned["finish_reason"], abandoned["route"]) == ("abort", "/v1/chat/completions")
    assert (nowhere["route"], nowhere["status"]) == ("none", 404)
    assert "a word" not in str(lines)
    assert "forged" not in str(lines)


@given(st.text())
def test_all_of_a_text_can_be_seen(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()
