"""Threads that fetch: a few at once, and none that a stop waits for."""

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from swaplora_adapters.errors import SourceFailedError
from swaplora_adapters.registry.sources.workers import Workers

GUARD_SECONDS = 60


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What the jobs of a test wait for; open when it ends."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def workers(gate: threading.Event) -> Iterator[Workers]:
    workers = Workers(2, "test-worker")
    yield workers
    gate.set()
    workers.stop()
    workers.join(time.monotonic() + GUARD_SECONDS)
    assert "test-worker" not in [thread.name for thread in threading.enumerate()]


def test_a_job_gives_what_it_returns_or_raises(workers: Workers) -> None:
    assert workers.submit(lambda: 7).result(GUARD_SECONDS) == 7
    with pytest.raises(ZeroDivisionError):
        workers.submit(lambda: 1 // 0).result(GUARD_SECONDS)
    assert workers.submit(lambda: 8).result(GUARD_SECONDS) == 8
    assert workers.num_jobs == 0


def test_only_so_many_run_at_once_and_the_rest_wait_in_order(workers: Workers, gate: threading.Event) -> None:
    begun: list[int] = []

    def job(number: int) -> bool:
        begun.append(number)
        return gate.wait(GUARD_SECONDS)

    jobs = [workers.submit(partial(job, number)) for number in range(6)]
    while len(begun) < 2:
        time.sleep(0.01)
    assert workers.num_jobs == 6
    assert not any(job.cancel() for job in jobs)
    assert begun == [0, 1]
    gate.set()
    assert all(job.result(GUARD_SECONDS) for job in jobs)
    assert sorted(begun) == list(range(6))


def test_a_stop_answers_all_who_wait_and_joins_no_longer_than_told(workers: Workers, gate: threading.Event) -> None:
    begun = threading.Semaphore(0)

    def job() -> None:
        begun.release()
        gate.wait(GUARD_SECONDS)

    jobs = [workers.submit(job) for _ in range(4)]
    for _ in range(2):
        assert begun.acquire(timeout=GUARD_SECONDS)
    workers.stop()
    workers.join(time.monotonic())
    for stopped in (*jobs, workers.submit(job)):
        with pytest.raises(SourceFailedError, match="stopping"):
            stopped.result(GUARD_SECONDS)
    gate.set()
    workers.join(time.monotonic() + GUARD_SECONDS)
    assert not begun.acquire(blocking=False)  # what waited was never begun


def test_a_worker_that_hangs_holds_up_no_exit(workers: Workers, gate: threading.Event) -> None:
    is_daemon = workers.submit(lambda: threading.current_thread().daemon)
    assert is_daemon.result(GUARD_SECONDS)
