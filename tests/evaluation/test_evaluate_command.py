"""`swaplora evaluate` and the client's part of it: what is sent, what is shown, how it ends."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_server import FakeServer, run_fake_server, swaplora
from swaplora_server.client import Client, ClientError
from swaplora_server.client.client import LOOK_SECONDS

BASE = {"model": "base", "name": None, "version": None, "digest": None}
SQL = {"model": "sql@2", "name": "sql", "version": 2, "digest": "sha256:" + "ab" * 32}
SCORE = {"num": 60, "mean": 0.75, "low": 0.6276, "high": 0.8422}
DONE = {
    "id": "eval_1",
    "state": "done",
    "ended": 2.0,
    "task": {"digest": "sha256:" + "cd" * 32, "num_items": 60},
    "progress": {"done": 120, "total": 120},
    "error": None,
    "results": [{**BASE, "metrics": {"score": {**SCORE, "mean": 0.0}}}, {**SQL, "metrics": {"score": SCORE}}],
    "comparisons": [
        {
            "models": ["base", "sql@2"],
            "metric": "score",
            "num": 60,
            "only_first": 0,
            "only_second": 45,
            "p_value": 5.7e-14,
        }
    ],
}
RUNNING = DONE | {"state": "running", "ended": None, "progress": {"done": 3, "total": 120}}
ITEM = '{"prompt": "a", "answer": "b"}\n'


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with run_fake_server() as fake:
        monkeypatch.setenv("SWAPLORA_URL", fake.url)
        fake.answer("POST", "/v1/evaluations", RUNNING, 201)
        fake.answer("GET", "/v1/evaluations/eval_1", DONE)
        yield fake


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "task.jsonl").write_text(ITEM)
    return str(tmp_path / "task.jsonl")


def test_what_was_asked_is_sent_and_what_came_is_shown(server: FakeServer, task: str) -> None:
    done = swaplora("evaluate", task, "--model", "base", "--model", "sql@2", "--max-tokens", "9", "--stop", ";")
    assert done.exit_code == 0, done.output
    assert server.bodies == [{"task": ITEM, "models": ["base", "sql@2"], "max_tokens": 9, "stop": [";"]}]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows == [
        ["model", "version", "metric", "items", "mean", "95", "%"],
        ["base", "-", "score", "60", "0.000", "0.628", "to", "0.842"],
        ["sql@2", "2", "score", "60", "0.750", "0.628", "to", "0.842"],
        ["first", "second", "items", "only", "first", "only", "second", "p"],
        ["base", "sql@2", "60", "0", "45", "5.7e-14"],
        ["eval_1,", "task", "sha256:cdcdcdcdcdcd"],
    ]
    assert json.loads(swaplora("evaluate", task, "--model", "base", "--json").stdout) == DONE
    assert server.bodies[1] == {"task": ITEM, "models": ["base"], "stop": []}


def test_one_that_was_not_done_says_why(server: FakeServer, task: str) -> None:
    error = {"code": "context_length_exceeded", "message": "item 2, asked of sql@2: too long"}
    server.answer("GET", "/v1/evaluations/eval_1", DONE | {"state": "failed", "error": error, "comparisons": []})
    failed = swaplora("evaluate", task, "--model", "base")
    assert failed.exit_code == 1
    assert (
        failed.stderr == "swaplora: the evaluation eval_1 was not done but failed: item 2, asked of sql@2: too long\n"
    )
    server.refuse("POST", "/v1/evaluations", 400, "task: line 1: answer: no", "invalid_request")
    refused = swaplora("evaluate", task, "--model", "base")
    assert (refused.exit_code, refused.stderr) == (1, "swaplora: task: line 1: answer: no (invalid_request)\n")


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_file_that_cannot_be_read_is_named(server: FakeServer, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "none.jsonl"
    if content is not None:
        file.write_bytes(content)
    failed = swaplora("evaluate", str(file), "--model", "base")
    assert failed.exit_code == 1
    assert failed.stderr.startswith("swaplora: ")
    assert "none.jsonl" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert not server.calls


def test_ctrl_c_cancels(server: FakeServer, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "wait_for_evaluation", interrupted)
    server.answer("POST", "/v1/evaluations/eval_1/cancel", DONE | {"state": "cancelled"})
    ended = swaplora("evaluate", task, "--model", "base")
    assert (ended.exit_code, ended.stdout) == (130, "")
    assert server.calls[-1].path == "/v1/evaluations/eval_1/cancel"
    assert "eval_1 is cancelled" in ended.stderr


def test_the_client_waits_and_tells_how_far_it_is(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer("GET", "/v1/evaluations/eval_1", RUNNING)
    server.answer("GET", "/v1/evaluations?limit=1000", {"data": [DONE], "has_more": False})
    server.answer("DELETE", "/v1/evaluations/eval_1", {"id": "eval_1"})
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        server.answer("GET", "/v1/evaluations/eval_1", DONE)

    monkeypatch.setattr("swaplora_server.client.client.time.sleep", sleep)
    heard: list[int] = []
    with Client(server.url) as client:
        begun = client.begin_evaluation([{"prompt": "a", "answer": "b"}], ["base"])
        assert client.wait_for_evaluation(begun["id"], lambda told: heard.append(told["progress"]["done"])) == DONE
        assert client.evaluations() == [DONE]
        client.delete_evaluation("eval_1")
        with pytest.raises(ClientError):
            client.evaluation("eval/../1")
    assert (heard, waits) == ([3, 120], [LOOK_SECONDS])
    assert server.calls[-1].path == "/v1/evaluations/eval%2F..%2F1"
