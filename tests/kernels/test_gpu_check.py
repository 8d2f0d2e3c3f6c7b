"""`make gpu-check --dry`: the script that checks a GPU runs whole on a CPU, and says so when something is wrong."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import gpu_check
from gpu_checks import card as card_checks
from gpu_checks.card import Card
from gpu_checks.operations import DTYPES, HEADS, heads_of
from gpu_checks.report import Report
from repository import ROOT

SECTIONS = {
    "card",
    "lora",
    "attention",
    "rows",
    "proof",
    "kinds",
    "bf16",
    "quantised",
    "http kinds",
    "isolation",
    "full card",
    "ablations",
    "peers",
    "served",
}
OF_A_BASE = {
    "memory",
    "decode",
    "graphs",
    "prompts",
    "loads",
    "swaps",
    "copies",
    "waits",
    "profile",
    "bits",
    "sampling",
}


def test_the_dry_form_runs_every_section_and_finds_nothing_wrong(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    folders = ("tools", "tools/proving", "server", "adapters", "tests/support", "tests/kinds")
    paths = [str(ROOT / name) for name in folders]
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--dry", "--out", str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(out.read_text())
    assert found["problems"] == []
    assert found["figures"].keys() >= SECTIONS | {f"tiny {name}" for name in OF_A_BASE}
    assert all("traceback" not in figures for figures in found["figures"].values())
    shares = [row["share"] for row in found["rows"] if "decode" in row["what"]]
    assert shares
    assert all(share > 0 for share in shares)


def test_a_section_that_raises_is_a_problem_and_ends_no_other(tmp_path: Path) -> None:
    report = Report(tmp_path / "out.json", Console(file=io.StringIO()))

    def broken(_report: Report) -> dict[str, object]:
        raise ValueError("a figure is missing")

    report.section("first", broken)
    report.section("second", lambda _report: {"figure": 1})
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["problems"] == ["first: ValueError: a figure is missing"]
    assert written["figures"]["second"]["figure"] == 1
    assert "broken" in written["figures"]["first"]["traceback"]


def test_every_size_of_heads_is_checked_in_every_dtype_that_the_kernels_take() -> None:
    assert [heads.size for heads in heads_of(DTYPES["fp32"])] == [64, 64, 128, 24]
    assert heads_of(DTYPES["fp16"]) == heads_of(DTYPES["bf16"]) == list(HEADS)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three sections that measure nothing, and those of them that ran."""
    ran: list[str] = []

    def section(name: str) -> gpu_check.Section:
        def run(_report: Report) -> dict[str, Any]:
            ran.append(name)
            return {}

        return run

    monkeypatch.setattr(card_checks, "measure", lambda device, **_: (Card(device, True, 1.0, 1.0), {}))
    monkeypatch.setattr(card_checks, "show", lambda *_: None)
    monkeypatch.setattr(gpu_check, "sections", lambda *_: {name: section(name) for name in ("one", "two", "three")})
    return ran


def test_it_goes_on_behind_a_section_after_which_the_device_computes_nothing(
    few: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faults = iter([None, "an illegal address"])
    report = Report(tmp_path / "out.json", Console(file=io.StringIO()))
    with monkeypatch.context() as broken:
        broken.setattr(gpu_check, "fault_of", lambda _device: next(faults))
        assert gpu_check.run(report, is_dry=True) == "three"
    again = Report(report.out, report.console)
    again.go_on()
    assert gpu_check.run(again, is_dry=True, first="three") is None
    assert few == ["one", "two", "three"]
    assert list(again.figures) == ["card", "one", "two", "three"]
    assert again.problems == ["two: the device computes nothing after it: an illegal address"]


def test_what_is_left_when_its_time_is_up_is_named(few: list[str], tmp_path: Path) -> None:
    report = Report(tmp_path / "out.json", Console(file=io.StringIO()), began=time.monotonic() - 10_000)
    assert gpu_check.run(report, is_dry=True, first="two") is None
    assert not few
    assert report.problems == ["two, three did not run: go on with --from 'two'"]
