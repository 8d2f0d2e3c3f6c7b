"""Threads whose work has no part in a step come after those that compute; so does the process that derives."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from repository import ROOT
from serving import serving, settings
from swaplora_adapters.derive import inspect_weights
from swaplora_adapters.priority import NICENESS, lower_priority
from swaplora_adapters.sources.workers import Workers
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.service.offload import Offload

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")

GUARD_SECONDS = 60
PROMPT = list(range(30, 50))


def niceness(thread: int = 0) -> int:
    """Of a thread of this process by its number; 0 is the one that asks."""
    return os.getpriority(os.PRIO_PROCESS, thread)


def lowered() -> int:
    return min(19, niceness(os.getpid()) + NICENESS)


def in_a_thread(job: Callable[[], int]) -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(job()))
    thread.start()
    thread.join(GUARD_SECONDS)
    return found[0]


def by_name() -> dict[str, int]:
    """The niceness of each thread that runs, by its name without a number."""
    threads = [(re.sub(r"_\d+$", "", each.name), each.native_id) for each in threading.enumerate()]
    return {name: niceness(number) for name, number in threads if number is not None}


def documented() -> set[str]:
    """Threads whose row of the architecture's table says so."""
    table = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (`.+?`) \| .*?low priority \|", table, re.MULTILINE)
    return {name for row in rows for name in re.findall("`([a-z-]+)`", row)}


def test_a_server_lowers_the_threads_that_its_documentation_says(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapters[0], tmp_path / "folder" / "sent")
    inspecting: list[int] = []

    def inspected(weights: AdapterWeights) -> list[inspect_weights.ModuleInspection]:
        inspecting.append(niceness())
        return inspect_weights.inspect_weights(weights)

    monkeypatch.setattr("swaplora_server.http.routes.inspection.inspect_weights", inspected)
    fields = {"adapter_dir": tmp_path / "folder", "adapter_rescan_seconds": 3600}
    with serving(settings(base, tmp_path / "data", **fields)) as server:
        assert server.put("uploaded", adapters[2]).status_code == 201
        assert server.client.put("/v1/adapters/fetched", json={"source": "file:sent"}).status_code == 201
        shutil.copytree(adapters[3], tmp_path / "folder" / "later")
        assert len(server.token_ids("later", PROMPT, 1)) == 1  # looked for, and loaded
        assert server.client.get("/v1/adapters/later/inspect").status_code == 200
        found = by_name()
    assert inspecting == [lowered()]
    low = {name for name, value in found.items() if value == lowered()}
    expected = {"upload", "adapter-load", "adapter-verify", "adapter-fetch", "adapter-look-near", "adapter-folder"}
    assert expected <= low <= documented()
    assert not documented() & (found.keys() - low)
    assert {found["engine"], found["adapter-admission"]} == {niceness(os.getpid())}


def test_jobs_of_workers_run_at_low_priority() -> None:
    workers = Workers(1, "test-worker")
    assert workers.submit(niceness).result(GUARD_SECONDS) == lowered()
    workers.stop()
    workers.join(time.monotonic() + GUARD_SECONDS)


def test_a_job_runs_after_what_its_thread_begins_with() -> None:
    async def main() -> list[int]:
        offloads = Offload(1, 0, "test-low", begin=lower_priority), Offload(1, 0, "test-usual")
        return [await offload.do(1, niceness) for offload in offloads]

    assert asyncio.run(main()) == [lowered(), niceness()]


def test_a_thread_that_is_lowered_twice_or_begun_by_a_lowered_one_is_not_lower() -> None:
    def lower() -> int:
        lower_priority()
        return niceness()

    assert in_a_thread(lambda: max(lower(), lower(), in_a_thread(lower))) == lowered()


def test_the_process_that_derives_comes_as_far_after_the_server_as_a_thread_does() -> None:
    """Though the thread that starts it has been lowered already, which it inherits."""
    code = "import os, sys; from swaplora_adapters.derive.process import bound_this_process as bound; bound()"
    code += "; sys.exit(os.getpriority(os.PRIO_PROCESS, 0))"

    def begin() -> int:
        lower_priority()
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT / "server").returncode

    assert in_a_thread(begin) == lowered()
