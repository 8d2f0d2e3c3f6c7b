"""Derivations that last until they are let go, in the process that does them: the server's own, or another's."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

GUARD_SECONDS = 600  # what is computed runs at low priority
# Python imports this in every process that finds it; it does something in the worker alone. What a job does without is
# not imported for it.
_SITECUSTOMIZE = """
import sys
if "swaplora_adapters.derive.worker" in sys.orig_argv:
    import os, pathlib, time
    from importlib.machinery import PathFinder

    folder = pathlib.Path(__file__).parent

    def held(function):
        def hold(*arguments, **options):
            (folder / f"{function.__name__}-{os.getpid()}").touch()
            while not (folder / "go").exists() and not (folder / f"go_{function.__name__}").exists():
                time.sleep(0.02)
            return function(*arguments, **options)
        return hold

    class Holding:
        functions = {"compose": "compose", "convert": "convert", "intruders": "count_intruders"}

        def find_spec(self, name, path, target=None):
            package, _, module_name = name.rpartition(".")
            if package != "swaplora_adapters.derive" or module_name not in self.functions:
                return None
            function, spec = self.functions[module_name], PathFinder.find_spec(name, path)
            execute = spec.loader.exec_module

            def execute_and_hold(module):
                execute(module)
                setattr(module, function, held(getattr(module, function)))

            spec.loader.exec_module = execute_and_hold
            return spec

    sys.meta_path.insert(0, Holding())
"""


@dataclass(frozen=True)
class HeldDerivations:
    """What has begun, and a way to let it end."""

    folder: Path

    @property
    def pids(self) -> list[int]:
        """Of the processes that have begun, whether they still run or not."""
        return [int(path.name.rpartition("-")[2]) for path in self.folder.glob("*-*")]

    @property
    def num_begun(self) -> int:
        return len(self.pids)

    def wait_for_begun(self, number: int) -> None:
        """Until so many have begun, all in all."""
        deadline = time.monotonic() + GUARD_SECONDS
        while self.num_begun < number:
            assert time.monotonic() < deadline, "no derivation has begun"
            time.sleep(0.02)

    def wait_for_end(self) -> None:
        """Until none runs any more."""
        deadline = time.monotonic() + GUARD_SECONDS
        while any(map(_is_alive, self.pids)):
            assert time.monotonic() < deadline, "a derivation runs on"
            time.sleep(0.02)

    def let_go(self, job: str = "") -> None:
        """Let all go on, or those of one job, and those that begin from now on not stop."""
        (self.folder / (f"go_{job}" if job else "go")).touch()


def hold_derivations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> HeldDerivations:
    """For processes that this one starts, until the test is over."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    return HeldDerivations(folder)


def _is_alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended unwaited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
