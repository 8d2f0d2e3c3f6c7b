"""Who waits for whom: a model of all connections, in which only time that the server had counts."""

import asyncio
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import settings
from swaplora_server import serve
from swaplora_server.http.transport.connections import Connections, Pace

MOST = 5
HEAD_SECONDS = 8.0
IDLE_SECONDS = 20.0


class Noted:
    """A connection that notes what it is told."""

    def __init__(self) -> None:
        self.state = "head"
        self.is_gone = False

    def drop(self) -> None:
        self.is_gone = True

    def time_out(self) -> None:
        self.state = "busy"
        self.is_gone = True

    def check(self, seconds: float) -> None:
        pass

    def refuse_unanswered(self) -> None:
        self.is_gone = True


class StillConnections(Connections):
    """Time goes on when a test says so."""

    def _sweep_later(self) -> None:
        self.sweep: Callable[[], None] = self._sweep


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def connections(most: int = MOST) -> StillConnections:
    patience = {"head_seconds": HEAD_SECONDS, "keep_alive_seconds": IDLE_SECONDS, "stall_seconds": 4.0}
    return StillConnections(settings(Path(), Path(), max_connections=most, **patience))


OPERATIONS = st.tuples(st.sampled_from(["enter", "head", "rest", "work", "leave"]), st.integers(0, MOST - 1))


@given(st.lists(OPERATIONS))
def test_the_one_that_has_waited_longest_makes_room_and_none_at_work(ops: list[tuple[str, int]]) -> None:
    kept = connections()
    model: list[Noted] = []  # in the order in which they came into their states
    for what, which in ops:
        if what == "enter":
            new = Noted()
            is_in = kept.enter(new)
            waiting = [c for c in model if c.state == "head"] or [c for c in model if c.state == "idle"]
            assert is_in == (len(model) < MOST or bool(waiting))
            if len(model) == MOST and waiting:
                assert waiting[0].is_gone
                model.remove(waiting[0])
            if is_in:
                model.append(new)
            else:
                kept.leave(new)
        elif which < len(model):
            chosen = model.pop(which)
            if what == "leave":
                kept.leave(chosen)
            else:
                chosen.state = {"head": "head", "rest": "idle", "work": "busy"}[what]
                {"head": kept.await_head, "rest": kept.rest, "work": kept.work}[what](chosen)
                model.append(chosen)
        assert len(kept) == len(model) <= MOST
        assert not any(c.is_gone for c in model)


def test_each_wait_has_its_time_and_work_has_none(clock: list[float]) -> None:
    kept, head, resting, working = connections(), Noted(), Noted(), Noted()
    for connection in (head, resting, working):
        kept.enter(connection)
    kept.rest(resting)
    kept.work(working)
    gone_after: dict[str, float] = {}
    for second in range(60):
        for name, connection in (("head", head), ("resting", resting), ("working", working)):
            if connection.is_gone:
                gone_after.setdefault(name, second)
        clock[0] += 1
        kept.sweep()
    assert gone_after == {"head": HEAD_SECONDS, "resting": IDLE_SECONDS}


def test_time_in_which_the_server_was_held_up_does_not_count(clock: list[float]) -> None:
    kept, connection = connections(), Noted()
    kept.enter(connection)
    clock[0] += 1000
    kept.sweep()
    assert not connection.is_gone


async def test_a_server_without_connections_does_not_look_for_them() -> None:
    kept, connection = Connections(settings(Path(), Path(), head_seconds=0.04)), Noted()
    kept.enter(connection)
    async with asyncio.timeout(60):
        while not connection.is_gone:
            await asyncio.sleep(0.01)
        kept.leave(connection)
        while kept._is_sweeping:  # noqa: SLF001
            await asyncio.sleep(0.01)
    assert kept.enter(Noted())  # and begins again


MOVES = st.lists(st.tuples(st.integers(0, 5000), st.floats(0.01, 3)), max_size=50)


@given(MOVES)
def test_who_moves_as_much_as_wanted_keeps_up(moves: list[tuple[int, float]]) -> None:
    pace = Pace(100, 10)
    assert all(pace.keeps_up(num_bytes + int(100 * seconds) + 1, seconds) for num_bytes, seconds in moves)


@given(MOVES)
def test_who_rests_for_longer_than_allowed_does_not_whatever_came_before(moves: list[tuple[int, float]]) -> None:
    pace = Pace(100, 10)
    for num_bytes, seconds in moves:
        pace.keeps_up(num_bytes, seconds)
    assert not [pace.keeps_up(0, 1) for _ in range(10)][-1]


def test_a_rest_of_less_is_made_up_for() -> None:
    pace = Pace(100, 10)
    assert all(pace.keeps_up(0, 1) for _ in range(9))
    assert pace.keeps_up(5000, 1)
    assert all(pace.keeps_up(0, 1) for _ in range(9))


def test_the_limit_of_open_files_is_raised_and_one_that_is_too_low_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(100, 400)]
    monkeypatch.setattr(resource, "getrlimit", lambda _what: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _what, limit: limits.append(limit))
    serve._allow_files(settings(Path(), Path(), max_connections=300))  # noqa: SLF001
    assert limits[-1] == (400, 400)
    with pytest.raises(serve.StartError, match="room for 300 connections, not 301; raise it"):
        serve._allow_files(settings(Path(), Path(), max_connections=301))  # noqa: SLF001
