"""The process that computes: bounded in memory and processor time, ended with the server, its errors told here."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter_files import SHAPES, write_adapter
from held_derivations import HeldDerivations, hold_derivations
from server_process import SMALL
from server_process import process as serve
from serving import Running
from swaplora_adapters.cancellation import Cancellation, WorkCancelledError
from swaplora_adapters.derive import process
from swaplora_adapters.derive.process import DerivationProcess
from swaplora_adapters.errors import AdapterTooLargeError, DerivationFailedError, InvalidAdapterError, StoppingError
from swaplora_adapters.sources.workers import Workers
from test_faults import check_refused, leave_free, small_disk, why_no_mount

GUARD_SECONDS = 600
BOUNDED = "import torch; from swaplora_adapters.derive.process import bound_this_process; bound_this_process({}, {}); "


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Derivations are started as users' are."""
    monkeypatch.setattr(process, "Popen", subprocess.Popen)


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


@pytest.mark.usefixtures("started")
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
    bounds = ((-signal.SIGXCPU, "1800 seconds"), (-signal.SIGKILL, "4096 MiB"), (1, "4096 MiB"), (0, "4096 MiB"))
    for status, bound in bounds:
        with pytest.raises(DerivationFailedError, match=bound):
            process.read_answer(status, b"")


def test_a_stop_ends_the_job_that_runs_and_begins_no_other(tmp_path: Path) -> None:
    folder, derivations = write_adapter(tmp_path / "a"), DerivationProcess()
    failures: list[Exception] = []

    def work() -> None:
        try:
            derivations.run("compose", compose(folder, tmp_path / "never"))
        except StoppingError as error:
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
    with pytest.raises(StoppingError, match="the server is stopping"):
        derivations.run("compose", compose(folder, tmp_path / "never"))


@pytest.mark.usefixtures("started")
def test_what_a_library_prints_is_no_part_of_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nprint('noise', flush=True)\nos.write(1, b'noise')\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = DerivationProcess().run("compose", compose(write_adapter(tmp_path / "a"), tmp_path / "done"))
    assert done["error"]["overall"] == 0


def test_the_server_and_a_sum_do_without_peft() -> None:
    imports = "swaplora_server.http.app, swaplora_adapters.derive.deriver, swaplora_adapters.derive.worker"
    code = f"import sys, {imports}; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("started")
def test_a_process_that_cannot_be_started_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(DerivationFailedError, match="no process could be started for it: No such file"):
        DerivationProcess().run("compose", {})


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HeldDerivations:
    return hold_derivations(tmp_path / "hanging", monkeypatch)


def test_a_job_that_nobody_waits_for_is_ended(hanging: HeldDerivations, tmp_path: Path) -> None:
    folder, derivations, cancellation = write_adapter(tmp_path / "a"), DerivationProcess(), Cancellation()
    jobs = Workers(2, "test-derive")
    running = jobs.submit(lambda: derivations.run("compose", compose(folder, tmp_path / "never"), cancellation))
    hanging.wait_for_begun(1)
    waiting_cancellation = Cancellation()
    waiting = jobs.submit(lambda: derivations.run("compose", compose(folder, tmp_path / "never"), waiting_cancellation))
    waiting_cancellation.leave()
    with pytest.raises(WorkCancelledError):
        waiting.result(GUARD_SECONDS)
    assert derivations.is_running
    cancellation.leave()
    with pytest.raises(WorkCancelledError):
        running.result(GUARD_SECONDS)
    hanging.let_go()
    assert derivations.run("compose", compose(folder, tmp_path / "done"))["error"]["overall"] == 0
    assert hanging.num_begun == 2
    jobs.stop()


def test_the_process_ends_with_a_server_that_is_killed(
    base: Path, adapters: list[Path], tmp_path: Path, hanging: HeldDerivations
) -> None:
    with serve(base, tmp_path / "data", *SMALL) as (server, client), ThreadPoolExecutor(1) as pool:
        running = Running(str(client.base_url), None, client)  # type: ignore[arg-type]  # another process's
        assert running.put("one", adapters[0]).status_code == 201
        body = {"name": "new", "from": [{"name": "one", "scale": 2}]}
        made = pool.submit(client.post, "/v1/merged", json=body, timeout=GUARD_SECONDS)
        hanging.wait_for_begun(1)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            made.result(GUARD_SECONDS)
        hanging.wait_for_end()


def test_a_full_disk_is_told_as_it_is_for_an_upload(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    if reason := why_no_mount():
        pytest.skip(reason)
    with small_disk(base, tmp_path / "data") as (running, disk):
        assert running.put("one", adapters[5]).status_code == 201
        body = {"name": "new", "from": [{"name": "one", "scale": 2}]}
        assert (adapters[5] / "adapter_model.safetensors").stat().st_size > 48 << 10
        leave_free(disk, 32 << 10)  # for a config, and not for the weights
        answer = running.client.post("/v1/merged", json=body, timeout=GUARD_SECONDS)
        check_refused(answer, "storage_full", disk)
        assert "no room is left" in answer.json()["error"]["message"]
        assert running.client.get("/v1/adapters/new").status_code == 404
        (disk / "filler").unlink()
        assert running.client.post("/v1/merged", json=body, timeout=GUARD_SECONDS).status_code == 201
