"""The client as a program uses it: errors to decide by, what is asked again, and the page's own example."""

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_server import CARD, FakeServer, run_fake_server
from repository import ROOT
from serving import Running
from swaplora_server.client import Client, ClientError


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with run_fake_server() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited each time."""
    told: list[float] = []
    monkeypatch.setattr(time, "sleep", told.append)
    return told


def test_an_error_has_what_a_program_decides_by(fake: FakeServer) -> None:
    fake.answer(
        "GET", "/v1/adapters/x", {"error": {"message": "no", "code": "adapter_not_found", "param": "name"}}, 404
    )
    with Client(fake.url) as client:
        with pytest.raises(ClientError, match=r"no \(adapter_not_found\)") as caught:
            client.adapter("x")
        assert (caught.value.status, caught.value.code, caught.value.param) == (404, "adapter_not_found", "name")
        with pytest.raises(ClientError) as caught:
            client.adapter("y")
        assert (caught.value.status, caught.value.code) == (404, None)
    with pytest.raises(ClientError) as caught, Client("http://127.0.0.1:9") as client:
        client.models()
    assert caught.value.status is None


def test_a_server_that_says_when_is_asked_again(fake: FakeServer, waits: list[float]) -> None:
    fake.answer("PUT", "/v1/adapters/sql", CARD)
    fake.retry_after = ["1", "600"]
    with Client(fake.url) as client:
        files = io.BytesIO(b"config"), io.BytesIO(b"weights")
        assert client.put_adapter("sql", *files)["version"] == 2
    assert waits == [1, 60]
    parts = [re.split(rb"--[0-9a-f]{32}", call.body)[1:3] for call in fake.calls]
    assert len(parts) == 3
    assert all(part == parts[0] and b"config" in part[0] and b"weights" in part[1] for part in parts)


@pytest.mark.parametrize(
    ("retries", "told", "num_calls"),
    [(2, ["1"] * 9, 3), (0, ["1"], 1), (2, ["soon"], 1), (2, ["-1"], 1), (2, ["²"], 1)],
)
def test_it_is_asked_so_often_and_only_if_it_says_when(
    fake: FakeServer, waits: list[float], retries: int, told: list[str], num_calls: int
) -> None:
    fake.retry_after = told
    with Client(fake.url, retries=retries) as client, pytest.raises(ClientError) as caught:
        client.models()
    assert (caught.value.status, len(fake.calls), len(waits)) == (429, num_calls, num_calls - 1)


def test_what_cannot_be_read_twice_is_sent_once(fake: FakeServer, waits: list[float]) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    fake.retry_after = ["1"]
    with Client(fake.url) as client, pytest.raises(ClientError):
        client.put_adapter("sql", Pipe(b"a"), Pipe(b"b"))
    assert (len(fake.calls), waits) == (1, [])


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout=0.05) as client, pytest.raises(ClientError, match="took too long"):
            client.models()


def test_the_pages_example_does_what_it_says(
    server: Running, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "ClientError" in code)
    example = example.replace("http://127.0.0.1:8000", server.url).replace('"my-adapter"', f'"{adapters[0]}"')
    names: dict[str, Any] = {}
    exec(compile(example, "docs/adapters.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "request_id" not in line] == ["adapter_busy"], "but for the server's own log"
    with Client(server.url) as client:
        assert client.alias("prod")["targets"] == [{"target": "mine@1", "weight": 1}]
    client.close()  # a second time
