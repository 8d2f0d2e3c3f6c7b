"""The programs in tools/ and demo/ start with what the Makefile gives them."""

import os
import re
import subprocess
import sys

import pytest

from repository import ROOT

OTHERS = re.findall(r"^TOOL := PYTHONPATH=(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0]
# audit.py runs beside a test; fuzz.py imports what it needs when it knows what for
TOOLS = ("bench", "bench_encoders", "bench_life", "fuzz_api", "isolation", "kinds_table", "refused_list")
DEMO = ("cards", "evaluate", "make_data", "task", "tasks", "train_classifiers")


@pytest.mark.parametrize(("folder", "programs", "others"), [("tools", TOOLS, OTHERS), ("demo", DEMO, "")])
def test_a_program_finds_what_it_imports(folder: str, programs: tuple[str, ...], others: str) -> None:
    path = ":".join(filter(None, [folder, others]))  # its own folder is the first where Python looks
    code = f"import {', '.join(programs)}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_makefile_runs_programs_that_are_there() -> None:
    named = re.findall(r"\b(?:tools|demo)/\w+\.py\b", (ROOT / "Makefile").read_text())
    assert [program for program in named if not (ROOT / program).is_file()] == []
    assert named
