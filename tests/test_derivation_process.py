"""The process that computes: bounded in memory and processor time, ended with the server, its errors told here."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from adapter_files import SHAPES, write_adapter
from swaplora_adapters.derive import process
from swaplora_adapters.derive.process import DerivationProcess
from swaplora_adapters.errors import AdapterTooLargeError, DerivationFailedError, InvalidAdapterError

GUARD_SECONDS = 600
BOUNDED = "import torch; from swaplora_adapters.derive.process import bound_this_process; bound_this_process({}, {}); "


def compose(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A job's arguments."""
    out.mkdir(exist_ok=True)
    shapes = {path: list(shape) for path, shape in SHAPES.items()}
    arguments = {"folders": [str(folder)], "scales": [2.0], "recipe": {"method": "sum"}, "out": str(out)}
    return arguments | {"shapes": shapes, "base_model": "base", "max_bytes": 1 << 20} | changes


def run_bounded(memory_bytes: int, cpu_seconds: int, body: str) -> int:
    code = BOUNDED.format(memory_bytes, cpu_seconds) + body
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode


def test_memory_and_processor_time_are_bounded() -> None:
    allocate = "x = torch.empty({} << 20, dtype=torch.uint8)"
    assert run_bounded(256 << 20, 60, allocate.format(100)) == 0
    assert run_bounded(256 << 20, 60, allocate.format(300)) == 1
    assert run_bounded(256 << 20, 1, "exec('while True: pass')") == -signal.SIGXCPU


def test_a_job_that_fails_says_why_and_the_next_one_runs(tmp_path: Path) -> None:
    folder, derivations = write_adapter(tmp_path / "a"), DerivationProcess()
    with pytest.raises(AdapterTooLargeError, match="is larger than 10 bytes"):
        derivations.run("compose", compose(folder, tmp_path / "small", max_bytes=10))
    folder.joinpath("adapter_config.json").write_text("{}")
    with pytest.raises(InvalidAdapterError, match="peft_type must be a string") as caught:
        derivations.run("compose", compose(folder, tmp_path / "broken"))
    assert len(caught.value.reasons) == 1
    write_adapter(tmp_path / "a")
    done = derivations.run("compose", compose(folder, tmp_path / "done"))
    assert done["error"]["overall"] == 0
    assert (tmp_path / "done" / "adapter_model.safetensors").stat().st_size > 0


def test_a_job_that_passes_its_bounds_names_them() -> None:
    for status, bound in ((-signal.SIGXCPU, "1800 seconds"), (-signal.SIGKILL, "4096 MiB"), (1, "4096 MiB")):
        with pytest.raises(DerivationFailedError, match=bound):
            process.read_answer(status, b"")


def test_a_stop_ends_the_job_that_runs_and_begins_no_other(tmp_path: Path) -> None:
    folder, derivations = write_adapter(tmp_path / "a"), DerivationProcess()
    failures: list[Exception] = []

    def work() -> None:
        try:
            derivations.run("compose", compose(folder, tmp_path / "never"))
        except DerivationFailedError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + GUARD_SECONDS
    while not derivations.is_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    derivations.stop()
    thread.join(GUARD_SECONDS)
    assert len(failures) == 1
    with pytest.raises(DerivationFailedError, match="the server is stopping"):
        derivations.run("compose", compose(folder, tmp_path / "never"))
