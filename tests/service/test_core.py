"""The service without HTTP: made, asked and stopped in a process that cannot import a web framework."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from oracle import Oracle
from repository import ROOT

PROMPT = list(range(40, 60))
TOO_LONG = [7] * 600
TIE = 1e-4


@pytest.fixture(scope="module")
def said(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program without HTTP printed."""
    arguments: list[str | Path] = [
        tmp_path_factory.mktemp("data"),
        base,
        adapters[4],
        ROOT / ".cache",
        json.dumps([PROMPT, TOO_LONG]),
    ]
    program = Path(__file__).with_name("without_http.py")
    path = os.pathsep.join(map(str, (ROOT / "server", ROOT / "adapters")))
    done = subprocess.run(
        [sys.executable, program, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def test_no_web_framework_is_imported(said: dict[str, Any]) -> None:
    assert said["imported"] == []


def test_the_base_and_an_adapter_generate_what_peft_does(
    said: dict[str, Any], base: Path, adapters: list[Path]
) -> None:
    for model, oracle, versions in (
        ("base", Oracle(base), []),
        ("adapter", Oracle(base, adapters[4]), ["own@1"]),
    ):
        answer = said[model]
        assert len(answer["token_ids"]) == 6
        assert oracle.is_greedy(PROMPT, answer["token_ids"], TIE), model
        assert (answer["versions"], answer["outcome"]) == (versions, "completed")
    assert said["adapter"]["token_ids"] != said["base"]["token_ids"]
    assert said["sum"]["versions"] == ["own@1"]
    assert said["text"] == [tiny.byte_tokenizer().encode("hello", add_special_tokens=False)]


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        ("unknown", "model_not_found", "model"),
        ("too long", "context_length_exceeded", "prompt"),
        ("too many", "invalid_request", "n"),
    ],
)
def test_what_cannot_be_had_is_an_error_with_a_code_and_the_field_at_fault(
    said: dict[str, Any], asked: str, code: str, param: str
) -> None:
    assert said[asked] == {"code": code, "param": param}


def test_a_snapshot_counts_what_runs_and_what_was_looked_up(said: dict[str, Any]) -> None:
    during, after = said["adapter"]["during"], said["after"]
    assert during["num_running"] + during["num_waiting"] <= 1
    assert after["is_at_rest"]
    assert (after["num_running"], after["num_waiting"], after["num_failed_requests"]) == (0, 0, 0)
    assert after["num_free_blocks"] == after["num_blocks"] > len(TOO_LONG) // 16
    assert after["num_looked_up_tokens"] == 3 * len(PROMPT)  # those that were refused never came so far
