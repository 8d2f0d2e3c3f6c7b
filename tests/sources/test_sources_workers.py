"""Threads that fetch: a few at once, and none that a stop waits for."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial

import pytest

from swaplora_adapters.cancellation import Cancellation, WorkCancelledError
from swaplora_adapters.errors import StoppingError
from swaplora_adapters.sources.workers import Workers

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


def begin(workers: Workers, gate: threading.Event, cancellation: Cancellation | None = None) -> Future[bool]:
    """A job that has begun, and lasts until the gate is open."""
    begun = threading.Event()

    def job() -> bool:
        begun.set()
        return gate.wait(GUARD_SECONDS)

    future = workers.submit(job, cancellation=cancellation)
    assert begun.wait(GUARD_SECONDS)
    return future


def begin_two(workers: Workers, gate: threading.Event) -> None:
    """Keep both threads busy until the gate is open."""
    for _ in range(2):
        begin(workers, gate)


def test_a_job_that_nobody_waits_for_is_not_begun(workers: Workers, gate: threading.Event) -> None:
    begin_two(workers, gate)
    begun: list[str] = []
    cancellations = {name: Cancellation() for name in ("left", "shared", "kept")}
    jobs = {name: workers.submit(partial(begun.append, name), cancellation=i) for name, i in cancellations.items()}
    assert cancellations["shared"].join()
    for name in ("left", "shared"):
        cancellations[name].leave()
    with pytest.raises(WorkCancelledError):
        jobs["left"].result(GUARD_SECONDS)
    assert not cancellations["left"].join()  # what is given up is begun anew
    assert workers.num_jobs == 4
    gate.set()
    assert [jobs[name].result(GUARD_SECONDS) for name in ("shared", "kept")] == [None, None]
    assert begun == ["shared", "kept"]
    with pytest.raises(WorkCancelledError):
        workers.submit(partial(begun.append, "late"), cancellation=cancellations["left"]).result(GUARD_SECONDS)


def test_who_leaves_a_job_that_runs_leaves_it_running(workers: Workers, gate: threading.Event) -> None:
    cancellation = Cancellation()
    job = begin(workers, gate, cancellation)
    cancellation.leave()
    gate.set()
    assert job.result(GUARD_SECONDS)


def test_owners_take_turns(gate: threading.Event) -> None:
    workers, done = Workers(1, "test-turns"), list[str]()
    begin(workers, gate)
    jobs = [workers.submit(partial(done.append, job), owner=job[0]) for job in ("a1", "a2", "a3", "b1", "c1", "b2")]
    assert [workers.num_waiting_of(owner) for owner in "abcd"] == [3, 2, 1, 0]
    gate.set()
    for job in jobs:
        job.result(GUARD_SECONDS)
    assert done == ["a1", "b1", "c1", "a2", "b2", "a3"]
    workers.stop()


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
        with pytest.raises(StoppingError, match="stopping"):
            stopped.result(GUARD_SECONDS)
    gate.set()
    workers.join(time.monotonic() + GUARD_SECONDS)
    assert not begun.acquire(blocking=False)  # what waited was never begun


def test_a_worker_that_hangs_holds_up_no_exit(workers: Workers, gate: threading.Event) -> None:
    is_daemon = workers.submit(lambda: threading.current_thread().daemon)
    assert is_daemon.result(GUARD_SECONDS)


def test_a_thread_that_cannot_be_had_costs_no_place(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError, match="can't start"):
            workers.submit(lambda: None).result(0)
    assert workers.num_jobs == 0
    assert workers.submit(lambda: 42).result(GUARD_SECONDS) == 42
    with monkeypatch.context() as patch:  # where there is one, it does all
        patch.setattr(threading.Thread, "start", no_thread)
        assert workers.submit(lambda: 43).result(GUARD_SECONDS) == 43


def test_a_job_that_panics_costs_no_place(gate: threading.Event) -> None:
    class PanicError(BaseException):
        """What a library of another language raises."""

    def panic() -> None:
        raise PanicError

    one = Workers(1, "test-worker")
    with pytest.raises(RuntimeError, match="PanicError"):
        one.submit(panic).result(GUARD_SECONDS)
    assert one.submit(lambda: 42).result(GUARD_SECONDS) == 42
    one.stop()
    one.join(time.monotonic() + GUARD_SECONDS)


def test_one_owner_leaves_a_thread_to_the_others(gate: threading.Event) -> None:
    workers = Workers(3, "test-shares", most_of_one=2)
    begun: list[str] = []

    def job(owner: str) -> bool:
        begun.append(owner)
        return gate.wait(GUARD_SECONDS)

    greedy = [workers.submit(partial(job, "greedy"), owner="greedy") for _ in range(5)]
    while len(begun) < 2:
        time.sleep(0.01)
    assert workers.submit(lambda: 7, owner="other").result(GUARD_SECONDS) == 7
    assert begun == ["greedy"] * 2
    gate.set()
    assert all(one.result(GUARD_SECONDS) for one in greedy)
    workers.stop()
    workers.join(time.monotonic() + GUARD_SECONDS)
