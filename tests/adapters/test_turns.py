"""Loads and checks of adapters wait while a step runs, have a turn behind it, and come to an end all the same."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from serving import Running, serving, settings
from swaplora_adapters import priority
from swaplora_adapters.priority import TURNS, Turns, lower_priority, pause
from swaplora_server.engine.sampling.sampler import Sampler

GUARD_SECONDS = 60


def begun(job: Callable[[], object], *, is_low: bool = True) -> threading.Event:
    """Set once a thread of its own has done `job`."""
    is_done = threading.Event()

    def run() -> None:
        if is_low:
            lower_priority()
        job()
        is_done.set()

    threading.Thread(target=run, daemon=True).start()
    return is_done


def work(seconds: float = 0.005) -> None:
    """Of processor time, with pauses."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pause()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that have begun to wait; none of them waits for less than a step to end."""
    names: list[str] = []
    wait = Turns.wait

    def waited(turns: Turns, share: float) -> bool:
        names.append(threading.current_thread().name)
        return wait(turns, share)

    monkeypatch.setattr(Turns, "wait", waited)
    monkeypatch.setattr(priority, "_LONGEST_WAIT_SECONDS", GUARD_SECONDS)
    return names


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + GUARD_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_work_of_low_priority_waits_for_the_end_of_a_step_and_no_other_does(waits: list[str]) -> None:
    with TURNS.step():
        low = begun(pause)
        until(lambda: waits)
        assert begun(pause, is_low=False).wait(GUARD_SECONDS)
        assert not low.is_set()
    assert low.wait(GUARD_SECONDS)
    assert len(waits) == 1


def test_where_no_step_runs_nobody_waits(waits: list[str]) -> None:
    assert begun(work).wait(GUARD_SECONDS)
    with pytest.raises(ZeroDivisionError), TURNS.step():
        raise ZeroDivisionError
    assert begun(work).wait(GUARD_SECONDS)
    assert not waits


def test_it_stays_closed_until_the_steps_of_all_engines_have_ended() -> None:
    turns = Turns()
    with turns.step():
        with turns.step():
            pass
        assert not turns.is_open
    assert turns.is_open


class Clock:
    """What `priority` knows of the time, which moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("shares", "is_at_work", "turn"),
    [([], True, 0), ([1 / 8], True, 0.05), ([1 / 8, 1 / 4, 1 / 8], True, 0.1), ([1 / 4], False, 0.002)],
)
def test_a_step_is_followed_by_the_largest_share_of_its_time_that_is_asked_for_or_as_much_of_it_as_is_used(
    shares: list[float], is_at_work: bool, turn: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, clock = Turns(), Clock()
    monkeypatch.setattr(priority, "time", clock)
    monkeypatch.setattr(priority, "_LONGEST_WAIT_SECONDS", GUARD_SECONDS)
    sleep = clock.sleep

    def slept(seconds: float) -> None:
        assert turns.is_open
        sleep(seconds)
        if is_at_work:
            turns.note_pause()

    monkeypatch.setattr(clock, "sleep", slept)
    with turns.step():
        for share in shares:
            begun(partial(turns.wait, share))
        until(lambda: turns.num_waiting == len(shares))
        clock.now += 0.4
    assert clock.now == pytest.approx(100.4 + turn)


def test_who_waits_in_vain_goes_on_and_works_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that does not end holds nothing up for good, nor one piece after the other."""
    monkeypatch.setattr(priority, "_LONGEST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(priority, "_WORK_IN_LONG_STEPS_SECONDS", 0.005)
    number = [0]
    wait = Turns.wait

    def waited(turns: Turns, share: float) -> bool:
        number[0] += 1
        return wait(turns, share)

    monkeypatch.setattr(Turns, "wait", waited)
    with TURNS.step():
        assert begun(lambda: work(0.02)).wait(GUARD_SECONDS)
    assert 1 <= number[0] <= 5, "pieces of 5 ms, of 20"


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(settings(base, tmp_path_factory.mktemp("turns"))) as server:
        yield server


def test_a_server_has_a_step_from_its_beginning_to_its_samples_and_none_when_it_has_nothing_to_do(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    sample = Sampler.sample

    def sampled(self: Sampler, logits: torch.Tensor, *others: object) -> object:
        seen.append(TURNS.is_open)
        return sample(self, logits, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Sampler, "sample", sampled)
    assert len(server.token_ids("base", [1, 2, 3], 4)) == 4
    until(lambda: TURNS.is_open)
    assert seen == [False] * 4


@contextmanager
def busy_processors() -> Iterator[None]:
    """One process for each, that does nothing else, at this one's niceness."""
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            spinning = stack.enter_context(subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]))
            stack.callback(spinning.kill)
        yield


def test_an_upload_and_a_load_end_beside_a_stream_where_other_work_fills_the_processors(
    server: Running, adapters: list[Path]
) -> None:
    is_over = threading.Event()

    def stream() -> None:
        while not is_over.is_set():
            server.token_ids("base", [1, 2, 3], 8)

    with busy_processors():
        has_streamed = begun(stream, is_low=False)
        assert server.put("a", adapters[0]).status_code == 201
        assert len(server.token_ids("a", [1, 2, 3], 1)) == 1
        is_over.set()
        assert has_streamed.wait(GUARD_SECONDS)


def test_each_part_of_an_upload_and_of_a_load_has_pauses(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On threads of its own, none of which has anything left of the time that it had after a wait in vain."""
    names: list[str] = []
    shares: set[tuple[str, float]] = set()
    monkeypatch.setattr(priority, "_LEAST_WORK_SECONDS", 0.0)

    def waited(_turns: Turns, share: float) -> bool:
        names.append(re.sub(r"[_-]\d+$", "", threading.current_thread().name))
        shares.add((names[-1], share))
        return True

    monkeypatch.setattr(Turns, "wait", waited)
    with serving(settings(base, tmp_path)) as server, TURNS.step():
        assert server.put("b", adapters[1]).status_code == 201
        of_upload = names.copy()
        names.clear()
        assert len(server.token_ids("b", [1, 2, 3], 1)) == 1
    num_tensors = 2 * 2 * 7
    assert {*of_upload} == {"upload", "take-in"}
    assert len(of_upload) >= num_tensors + 4  # the body's parts, the header, the fit, the digest
    assert names.count("adapter-load") == num_tensors + 3
    assert names.count("adapter-verify") >= 1
    assert shares == {("upload", 1 / 8), ("take-in", 1 / 8), ("adapter-load", 1 / 4), ("adapter-verify", 1 / 4)}
