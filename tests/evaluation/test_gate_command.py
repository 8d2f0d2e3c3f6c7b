"""`swaplora gate` and `swaplora promote`: what is sent, what is shown, how they end."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_server import CARD, FakeServer, run_fake_server, swaplora

ITEM = '{"prompt": "a", "answer": "b"}\n'
TASK = {"digest": "sha256:" + "cd" * 32, "num_items": 60}
SCORE = {"num": 60, "mean": 0.75, "low": 0.6276, "high": 0.8422}
BAR = {"bar": "min_score", "task": TASK["digest"], "wanted": 0.9, "score": SCORE, "current_score": SCORE}
FAILED = {"against": 1, "bars": [BAR | {"is_met": False, "missed_by": 0.15}], "reason": "min_score: its score is 0.75"}
GATE = {
    "name": "sql",
    "task": TASK,
    "min_score": 0.9,
    "must_keep": TASK | {"max_drop": 0.02},
    "current": 1,
    "versions": [
        {"version": 1, "standing": None, "verdict": None},
        {"version": 2, "standing": "failed", "verdict": FAILED},
        {"version": 3, "standing": "candidate", "verdict": None},
    ],
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with run_fake_server() as fake:
        monkeypatch.setenv("SWAPLORA_URL", fake.url)
        for method in ("PUT", "GET", "DELETE"):
            fake.answer(method, "/v1/adapters/sql/gate", GATE)
        fake.answer("GET", "/v1/adapters/sql", CARD)
        yield fake


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "task.jsonl").write_text(ITEM)
    return str(tmp_path / "task.jsonl")


def test_a_gate_is_set_as_it_was_given(server: FakeServer, task: str) -> None:
    kept = ("--must-keep", task, "--max-drop", "0.02")
    done = swaplora(
        "gate", "set", "sql", "--task", task, "--min-score", "0.9", *kept, "--max-tokens", "9", "--stop", ";"
    )
    assert done.exit_code == 0, done.output
    wanted = {"task": ITEM, "min_score": 0.9, "must_keep": {"task": ITEM, "max_drop": 0.02}}
    assert server.bodies == [wanted | {"max_tokens": 9, "stop": [";"]}]
    assert done.stdout == "new versions of sql are current once they have passed; sql@1 is now\n"
    half = swaplora("gate", "set", "sql", "--task", task, "--min-score", "0.9", "--must-keep", task)
    assert (half.exit_code, len(server.bodies)) == (2, 1)
    assert "--must-keep and --max-drop go together" in half.output


def test_what_a_gate_asks_for_and_each_version_has_is_shown(server: FakeServer) -> None:
    shown = swaplora("gate", "show", "sql")
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert rows[1:] == [
        ["1", "(current)", *"-------"],
        ["2", "failed", "min_score", *["0.750", "0.628", "to", "0.842", "0.750", "0.900", "missed", "by", "0.150"]],
        ["3", "candidate", *"------"],
        *[line.split() for line in ("min_score 0.900 of 60 items, task sha256:cdcdcdcdcdcd",)],
        *[line.split() for line in ("max_drop 0.020 of 60 items, task sha256:cdcdcdcdcdcd",)],
        ["sql@2:", "min_score:", "its", "score", "is", "0.75"],
    ]
    assert json.loads(swaplora("gate", "show", "sql", "--json").stdout) == GATE
    assert swaplora("gate", "remove", "sql").stdout == "new versions of sql are current at once\n"
    assert [call.method for call in server.calls] == ["GET", "GET", "DELETE"]


def test_a_version_is_promoted_the_newest_unless_one_is_named(server: FakeServer) -> None:
    server.answer("PATCH", "/v1/adapters/sql", CARD)
    server.answer("PATCH", "/v1/adapters/sql?force=true", CARD)
    assert swaplora("promote", "sql").stdout == "sql stands for sql@2 now (abababababab)\n"
    assert swaplora("promote", "sql", "1", "--force").exit_code == 0
    assert server.bodies == [{"current": 2}, {"current": 1}]
    assert server.calls[-1].path == "/v1/adapters/sql?force=true"
    server.refuse("PATCH", "/v1/adapters/sql", 409, "sql@2 has not passed the gate of sql: why", "gate_failed")
    refused = swaplora("promote", "sql", "2")
    assert (refused.exit_code, refused.output) == (
        1,
        "swaplora: sql@2 has not passed the gate of sql: why (gate_failed)\n",
    )


def test_an_upload_that_is_a_candidate_says_so(server: FakeServer, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    stored = {"version": 3, "digest": "sha256:" + "cd" * 32, "standing": "candidate"}
    server.answer("PUT", "/v1/adapters/sql", CARD | {"stored": stored})
    done = swaplora("adapters", "put", "sql", str(tmp_path))
    assert done.stdout.splitlines() == [
        "sql@3 is stored (cdcdcdcdcdcd)",
        "sql stands for sql@2 until the new one has passed: swaplora gate show sql",
    ]


def test_a_roll_back_leaves_out_what_has_not_passed(server: FakeServer) -> None:
    versions = [{"version": 1, "standing": None}, {"version": 2, "standing": "failed"}, {"version": 3}]
    server.answer("GET", "/v1/adapters/sql", CARD | {"version": 3, "versions": versions})
    server.answer("PATCH", "/v1/adapters/sql", CARD)
    assert swaplora("adapters", "rollback", "sql").exit_code == 0
    assert server.bodies == [{"current": 1}]
