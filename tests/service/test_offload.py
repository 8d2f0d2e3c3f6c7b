"""Long work of requests: bounded, in a fair order, dropped with its client, and never what an exit waits for."""

import asyncio
import itertools
import subprocess
import sys
import threading
from functools import partial
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaplora_server.service.errors import RequestError
from swaplora_server.service.offload import GIL_PAUSE, PATIENCE, GilTurns, Offload, WorkQueue, in_own_thread

GUARD_SECONDS = 60


class Job(NamedTuple):
    number: int
    size: int


class Gate:
    """A job that runs until it is let go."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self) -> str:
        self.has_begun.set()
        assert self.may_end.wait(GUARD_SECONDS)
        return "done"


async def begun(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.has_begun.wait, GUARD_SECONDS)


async def until_waiting(offload: Offload, count: int) -> None:
    async with asyncio.timeout(GUARD_SECONDS):
        while offload.num_waiting != count:
            await asyncio.sleep(0)


@given(st.lists(st.one_of(st.integers(0, 1000), st.none())))
def test_a_job_is_overtaken_by_little_and_every_job_comes(pushes: list[int | None]) -> None:
    """None takes one job out; what is left at the end comes out too."""
    queue: WorkQueue[Job] = WorkQueue()
    jobs = [Job(number, size) for number, size in enumerate(pushes) if size is not None]
    done: list[Job] = []
    for number, size in enumerate(pushes):
        if size is not None:
            queue.push(size, Job(number, size))
        elif queue:
            done.append(queue.pop())
    done += [queue.pop() for _ in range(len(queue))]
    assert sorted(done) == jobs
    for place, job in enumerate(done):
        overtakers = [other for other in done[:place] if other.number > job.number]
        assert sum(other.size for other in overtakers) <= PATIENCE * job.size
        assert all(other.size < job.size for other in overtakers)


def test_a_short_job_overtakes_long_ones() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(8):
        queue.push(60_000, "long")
    queue.push(5_000, "short")
    assert queue.pop() == "short"


def test_a_long_job_comes_however_many_short_ones_keep_coming() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.push(10, "long")
    for number in itertools.count(1):
        queue.push(9, "short")
        if queue.pop() == "long":
            break
        assert 9 * number <= PATIENCE * 10


def test_only_so_many_run_at_once_and_the_rest_wait_their_turn() -> None:
    async def scenario() -> None:
        offload = Offload(2, 8, "test")
        gates = [Gate() for _ in range(4)]
        tasks = [asyncio.create_task(offload.do(1, gate)) for gate in gates]
        await begun(gates[0])
        await begun(gates[1])
        assert (offload.num_running, offload.num_waiting) == (2, 2)
        assert not gates[2].has_begun.is_set()
        gates[1].may_end.set()
        await begun(gates[2])
        assert not gates[3].has_begun.is_set()
        for gate in gates:
            gate.may_end.set()
        assert await asyncio.gather(*tasks) == ["done"] * 4
        assert (offload.num_running, offload.num_waiting) == (0, 0)

    asyncio.run(scenario())


def test_what_waits_for_nobody_is_never_begun_and_its_place_is_free() -> None:
    async def scenario() -> None:
        offload = Offload(1, 1, "test")
        running, abandoned, last = Gate(), Gate(), Gate()
        first = asyncio.create_task(offload.do(1, running))
        await begun(running)
        second = asyncio.create_task(offload.do(1, abandoned))
        await until_waiting(offload, 1)
        with pytest.raises(RequestError) as caught:
            await offload.do(1, last)
        assert caught.value.code == "overloaded"
        second.cancel()
        await asyncio.wait({second})
        third = asyncio.create_task(offload.do(1, last))
        await until_waiting(offload, 1)
        running.may_end.set()
        last.may_end.set()
        assert await first == await third == "done"
        assert not abandoned.has_begun.is_set()

    asyncio.run(scenario())


def test_what_runs_keeps_its_thread_until_it_ends_even_for_nobody() -> None:
    async def scenario() -> None:
        offload = Offload(1, 8, "test")
        abandoned, following = Gate(), Gate()
        first = asyncio.create_task(offload.do(1, abandoned))
        await begun(abandoned)
        first.cancel()
        await asyncio.wait({first})
        second = asyncio.create_task(offload.do(1, following))
        await until_waiting(offload, 1)
        assert not following.has_begun.is_set()
        following.may_end.set()
        abandoned.may_end.set()
        assert await second == "done"

    asyncio.run(scenario())


def test_an_error_is_raised_where_the_job_is_awaited() -> None:
    async def scenario() -> None:
        offload = Offload(1, 1, "test")
        with pytest.raises(ZeroDivisionError):
            await offload.do(1, lambda: 1 // 0)
        assert offload.num_running == 0

    asyncio.run(scenario())


def test_what_has_a_thread_of_its_own_waits_for_none_of_the_loops() -> None:
    async def scenario() -> None:
        gates = [Gate() for _ in range(40)]  # more than any number of processors gives the loop's own pool
        filling = [asyncio.get_running_loop().run_in_executor(None, gate) for gate in gates]
        try:
            assert await in_own_thread(lambda: "done") == "done"
        finally:
            for gate in gates:
                gate.may_end.set()
            await asyncio.gather(*filling)

    asyncio.run(scenario())


def test_no_exit_waits_for_what_nobody_waits_for() -> None:
    code = """
import asyncio, threading
from swaplora_server.service.offload import Offload
async def main():
    offload = Offload(1, 1, "endless")
    begun = threading.Event()
    task = asyncio.create_task(offload.do(1, lambda: begun.set() or threading.Event().wait()))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    await asyncio.wait({task})
    offload.join(0)
asyncio.run(main())
print("over")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=GUARD_SECONDS)
    assert (run.returncode, run.stdout) == (0, "over\n")


def test_a_thread_that_cannot_be_had_or_panics_costs_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicError(BaseException):
        """What a library of another language raises."""

    def panic() -> None:
        raise PanicError

    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        offload = Offload(1, 4, "test-offload")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(RuntimeError, match="can't start"):
                await offload.do(1, lambda: None)
        with pytest.raises(RuntimeError, match="PanicError"):
            await offload.do(1, panic)
        assert await offload.do(1, lambda: 42) == 42
        offload.join(GUARD_SECONDS)

    asyncio.run(main())


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=20))
def test_turns_come_one_after_the_other_with_three_times_as_long_between_two(asked: list[tuple[float, float]]) -> None:
    now, free_at = 0.0, 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def job(took: float) -> float:
        began = now
        sleep(took)
        return began

    turns = GilTurns(lambda: now, sleep)
    for passed, took in asked:
        now += passed
        expected = max(now, free_at)
        began = turns.do(partial(job, took))
        assert began == pytest.approx(expected)
        free_at = began + (1 + GIL_PAUSE) * took


def test_a_turn_that_fails_is_over() -> None:
    turns = GilTurns()
    with pytest.raises(ZeroDivisionError):
        turns.do(lambda: 1 // 0)
    assert turns.do(lambda: 1) == 1
