"""The programs in tools/ and demo/ start with what the Makefile gives them."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from repository import ROOT

OTHERS = re.findall(r"^TOOL := PYTHONPATH=(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0]
# audit.py runs beside a test; fuzz.py imports what it needs when it knows what for
TOOLS = ("bench", "bench_encoders", "bench_life", "bench_shared", "fuzz_api", "kinds_table", "refused_list")
DEMO = ("cards", "evaluate", "make_data", "task", "tasks", "train_classifiers")
NOT_INSTALLED = [ROOT / folder for folder in ("tests", "tools", "demo")]


@pytest.fixture
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the repository but what is installed has been imported or is where Python looks, until the end."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not is_ours(entry)])
    known = take_ours()
    yield
    take_ours()
    sys.modules.update(known)


def take_ours() -> dict[str, ModuleType]:
    """Forget what has been imported and is not installed, and give it."""
    ours = [name for name, module in sys.modules.items() if is_ours(getattr(module, "__file__", None))]
    return {name: sys.modules.pop(name) for name in ours}


def is_ours(path: str | None) -> bool:
    """Whether it is in a folder that is not installed."""
    return path is not None and any(Path(path).is_relative_to(folder) for folder in NOT_INSTALLED)


@pytest.mark.parametrize(("folder", "programs", "others"), [("tools", TOOLS, OTHERS), ("demo", DEMO, "")])
@pytest.mark.usefixtures("nothing_found")
def test_a_program_finds_what_it_imports(folder: str, programs: tuple[str, ...], others: str) -> None:
    # its own folder is the first where Python looks
    sys.path[:0] = [str(ROOT / entry) for entry in (folder, *filter(None, others.split(":")))]
    for program in programs:
        module = importlib.import_module(program)
        assert Path(str(module.__file__)).is_relative_to(ROOT / folder)


def test_the_makefile_runs_programs_that_are_there() -> None:
    named = re.findall(r"\b(?:tools|demo)/\w+\.py\b", (ROOT / "Makefile").read_text())
    assert [program for program in named if not (ROOT / program).is_file()] == []
    assert named
