"""Each thread of a step's team has a processor of its own, where the team takes them all."""

import os
import threading
from collections.abc import Callable

import pytest
import torch

from repository import KERNEL_CACHE
from swaplora_server.kernels.cpu.abi import load_library
from swaplora_server.kernels.cpu.team import bind_team

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="there is nothing to bind to"
)
LIBRARY = load_library(KERNEL_CACHE, lambda _message: None)
GUARD_SECONDS = 60


def tasks() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def bound_in_a_thread() -> tuple[set[int], list[set[int]]]:
    """Where a thread that has bound its team may run, and where the threads may that came with it."""
    found: list[tuple[set[int], list[set[int]]]] = []

    def run() -> None:
        before = tasks()
        bind_team(LIBRARY)
        found.append((os.sched_getaffinity(0), [os.sched_getaffinity(task) for task in tasks() - before]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(GUARD_SECONDS)
    return found[0]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has torch use so many, and nothing say where they run."""
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    return lambda number: monkeypatch.setattr(torch, "get_num_threads", lambda: number)


def test_a_team_of_all_processors_has_one_each(threads: Callable[[int], None]) -> None:
    everywhere = os.sched_getaffinity(0)
    threads(len(everywhere))
    leader, others = bound_in_a_thread()
    assert leader == {min(everywhere)}
    assert sorted(map(list, [leader, *others])) == [[processor] for processor in sorted(everywhere)]
    assert os.sched_getaffinity(0) == everywhere  # of the thread that does not run steps


def test_a_smaller_team_stays_free(threads: Callable[[int], None]) -> None:
    threads(len(os.sched_getaffinity(0)) - 1)
    assert bound_in_a_thread() == (os.sched_getaffinity(0), [])


@pytest.mark.parametrize("variable", ["OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"])
def test_what_openmp_is_told_comes_first(
    variable: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(len(os.sched_getaffinity(0)))
    monkeypatch.setenv(variable, "false")
    assert bound_in_a_thread() == (os.sched_getaffinity(0), [])
