"""Whatever a client's text holds, each line of the log is one that the server began."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from serving import settings
from swaplora_server.log_lines import visible
from swaplora_server.serve import configure_logging

# each would begin a line of its own somewhere, or move a cursor
HOSTILE = "/x\n\r\x0b\x0c\x1b[2K\x1c\x1d\x85\u2028\u2029\u202e\x9b2K\ud8002026-01-01 [error] forged"

UNQUOTED = "/x\x1b[2K\x85\u2028forged"


@contextmanager
def logging_set_up(folder: Path, *, log_json: bool = False) -> Iterator[None]:
    """As the server sets it up; taken back at the end."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # else nothing would be set up
    configure_logging(settings(folder, folder, log_json=log_json))
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


@given(st.text())
def test_all_of_a_text_can_be_seen(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()
