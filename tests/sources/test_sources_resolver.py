"""Looking for a name that is not here: where, how often, and what is remembered of it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaplora_adapters.cancellation import Cancellation, WorkCancelledError
from swaplora_adapters.errors import (
    InvalidAdapterError,
    OverloadedError,
    SourceFailedError,
    SourceNotAllowedError,
    SourceNotFoundError,
    StoppingError,
)
from swaplora_adapters.sources import resolver as module
from swaplora_adapters.sources.resolver import Look, Resolver

GUARD_SECONDS = 60


class Bringer:
    """Brings what is in `there`, fails with `error` if set, counts what it was asked; `gate` holds it up."""

    def __init__(self, *there: str) -> None:
        self.there = set(there)
        self.error: Exception | None = None
        self.asked: list[tuple[str, str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.num_running = self.most_running = 0
        self._lock = threading.Lock()

    def __call__(self, name: str, uri: str, _cancellation: Cancellation) -> None:
        with self._lock:
            self.asked.append((name, uri))
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
        assert self.gate.wait(GUARD_SECONDS)
        with self._lock:
            self.num_running -= 1
        if self.error is not None:
            raise self.error
        if uri not in self.there:
            raise SourceNotFoundError(uri)


class Clock:
    """Stands still until it is set forward."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@contextmanager
def resolving(
    bring: Bringer, *, has_folder: bool = True, template: str | None = "hf://org/{name}"
) -> Iterator[Resolver]:
    resolver = Resolver(bring, has_folder=has_folder, template=template)
    try:
        yield resolver
    finally:
        bring.gate.set()
        resolver.stop()
        resolver.join(time.monotonic() + GUARD_SECONDS)


def outcome(look: Look) -> bool:
    return look.future.result(GUARD_SECONDS)


@pytest.mark.parametrize(
    ("has_folder", "template", "uris"),
    [
        (True, "hf://org/{name}", ["file:one", "hf://org/one"]),
        (True, None, ["file:one"]),
        (False, "hf://org/repo@{name}", ["hf://org/repo@one"]),
        (False, "hf://org/repo/lora-{name}", ["hf://org/repo/lora-one"]),
        (False, "s3://bucket/adapters/{name}/latest", ["s3://bucket/adapters/one/latest"]),
        (False, None, []),
    ],
)
def test_the_adapter_folder_comes_before_the_template(has_folder: bool, template: str | None, uris: list[str]) -> None:
    with resolving(Bringer(), has_folder=has_folder, template=template) as resolver:
        assert resolver.candidates("one") == uris


@pytest.mark.parametrize(
    "template",
    [
        "hf://org/repo",
        "hf://{name}/{name}",
        "file:{name}",
        "hf://{name}",
        "s3://{name}",
        "hf://org/{name}/..",
        "{name}",
    ],
)
def test_a_badly_written_template_is_refused_at_the_start(template: str) -> None:
    with pytest.raises(SourceNotAllowedError):
        Resolver(Bringer(), has_folder=True, template=template)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a@b", "a:b", "a\n", "é", "a" * 129, "{name}"])
def test_what_cannot_be_a_name_is_a_miss_and_no_source_is_asked(name: str) -> None:
    bringer = Bringer()
    with resolving(bringer) as resolver:
        assert not outcome(resolver.find(name))
    assert not bringer.asked


def test_a_name_that_the_template_cannot_hold_is_looked_for_in_the_folder_alone() -> None:
    with resolving(Bringer()) as resolver:
        assert resolver.candidates("a" * 128) == ["file:" + "a" * 128]


def test_the_first_source_that_has_it_is_the_only_one_that_brings_it() -> None:
    bringer = Bringer("file:one", "hf://org/one", "hf://org/two")
    with resolving(bringer) as resolver:
        assert outcome(resolver.find("one"))
        assert outcome(resolver.find("two"))
    assert bringer.asked == [("one", "file:one"), ("two", "file:two"), ("two", "hf://org/two")]


def test_a_source_that_fails_is_not_passed_over_for_the_next() -> None:
    bringer = Bringer("hf://org/one")
    bringer.error = InvalidAdapterError(["broken"])
    with resolving(bringer) as resolver, pytest.raises(InvalidAdapterError, match="broken"):
        outcome(resolver.find("one"))
    assert bringer.asked == [("one", "file:one")]


def test_however_many_ask_there_is_one_look_that_nobody_can_cancel() -> None:
    bringer = Bringer("file:one")
    bringer.gate.clear()
    with resolving(bringer) as resolver:
        barrier = threading.Barrier(16)
        looks: list[Look] = []

        def ask() -> None:
            barrier.wait(GUARD_SECONDS)
            looks.append(resolver.find("one"))

        askers = [threading.Thread(target=ask) for _ in range(16)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(GUARD_SECONDS)
        assert not any(look.future.cancel() for look in looks)
        bringer.gate.set()
        assert [outcome(look) for look in looks] == [True] * 16
    assert bringer.asked == [("one", "file:one")]


def test_at_most_two_names_are_looked_for_at_once() -> None:
    bringer = Bringer()
    bringer.gate.clear()
    with resolving(bringer, template=None) as resolver:
        looks = [resolver.find(f"name{n}") for n in range(50)]
        while bringer.num_running < 2:
            threading.Event().wait(0.01)
        bringer.gate.set()
        assert not any(outcome(look) for look in looks)
    assert len(bringer.asked) == 50
    assert bringer.most_running <= 2


def test_a_miss_is_remembered_for_half_a_minute(clock: Clock) -> None:
    bringer = Bringer()
    with resolving(bringer, template=None) as resolver:
        assert not outcome(resolver.find("one"))
        bringer.there.add("file:one")
        clock.now += 29.9
        assert not outcome(resolver.find("one"))
        assert len(bringer.asked) == 1
        clock.now += 0.1
        assert outcome(resolver.find("one"))
        assert len(bringer.asked) == 2


def test_a_failure_is_remembered_for_five_seconds(clock: Clock) -> None:
    bringer = Bringer("file:one")
    bringer.error = SourceFailedError("down")
    with resolving(bringer) as resolver:
        with pytest.raises(SourceFailedError, match="down"):
            outcome(resolver.find("one"))
        bringer.error = None
        clock.now += 4.9
        with pytest.raises(SourceFailedError, match="down"):
            outcome(resolver.find("one"))
        assert len(bringer.asked) == 1
        clock.now += 0.1
        assert outcome(resolver.find("one"))


def test_a_find_is_not_remembered() -> None:
    bringer = Bringer("file:one")
    with resolving(bringer) as resolver:
        assert outcome(resolver.find("one"))
        assert outcome(resolver.find("one"))
    assert len(bringer.asked) == 2


def test_an_error_of_any_kind_reaches_who_waits() -> None:
    bringer = Bringer()
    bringer.error = ZeroDivisionError()
    with resolving(bringer) as resolver, pytest.raises(ZeroDivisionError):
        outcome(resolver.find("one"))


def test_remembered_names_are_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
    bringer = Bringer()
    with resolving(bringer, template=None) as resolver:
        for name in ("a", "b", "c", "d"):
            outcome(resolver.find(name))
        for name in ("b", "c", "d", "a"):
            outcome(resolver.find(name))
    assert [name for name, _ in bringer.asked] == ["a", "b", "c", "d", "a"]


def test_names_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOOKS", 3)
    bringer = Bringer()
    bringer.gate.clear()
    with resolving(bringer, template=None) as resolver:
        looks = [resolver.find(name) for name in ("a", "b", "c")]
        with pytest.raises(OverloadedError, match="too many other adapters are being looked for"):
            outcome(resolver.find("d"))
        assert resolver.find("a") is looks[0]
        bringer.gate.set()
        assert not any(outcome(look) for look in looks)
        assert not outcome(resolver.find("d"))  # that there were too many is not remembered


def test_a_flood_of_names_that_are_far_away_keeps_nobody_from_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOOKS", 8)
    far = threading.Event()
    asked = []

    def bring(_name: str, uri: str, _cancellation: Cancellation) -> None:
        asked.append(uri)
        if uri.startswith("hf:"):
            assert far.wait(GUARD_SECONDS)
        if uri != "file:real":
            raise SourceNotFoundError(uri)

    resolver = Resolver(bring, has_folder=True, template="hf://org/{name}")
    try:
        flood = [resolver.find(f"made-up{n}") for n in range(8)]
        while len(asked) < 8 + 2:
            threading.Event().wait(0.01)
        assert outcome(resolver.find("real"))
        far.set()
        assert not any(outcome(look) for look in flood)
    finally:
        far.set()
        resolver.stop()


def test_stopping_ends_every_wait_and_waits_for_no_slow_look() -> None:
    bringer = Bringer("file:a")
    bringer.gate.clear()
    resolver = Resolver(bringer, has_folder=True)
    looks = [resolver.find(name) for name in ("a", "b", "c")]
    while bringer.num_running < 2:
        threading.Event().wait(0.01)
    resolver.stop()
    resolver.join(time.monotonic())
    for look in (*looks, resolver.find("d")):
        with pytest.raises(StoppingError, match="stopping"):
            outcome(look)
    bringer.gate.set()
    resolver.join(time.monotonic() + GUARD_SECONDS)
    assert {name for name, _ in bringer.asked} == {"a", "b"}


def test_names_whose_askers_have_gone_are_not_looked_for() -> None:
    bringer = Bringer("hf://org/real")
    bringer.gate.clear()
    with resolving(bringer, has_folder=False) as resolver:
        flood = [resolver.find(f"made-up{n}", "flooder") for n in range(50)]
        again = resolver.find("made-up9", "another")
        while bringer.num_running < 2:
            threading.Event().wait(0.01)
        for look in flood:
            look.cancellation.leave()
        real = resolver.find("real", "flooder")
        bringer.gate.set()
        assert outcome(real)
        assert not outcome(again)  # which one still waits for
        with pytest.raises(WorkCancelledError):
            outcome(flood[30])
        assert not outcome(resolver.find("made-up30"))  # that it was given up is not remembered
    assert {name for name, _ in bringer.asked} == {"made-up0", "made-up1", "made-up9", "made-up30", "real"}


def test_a_look_that_is_given_up_while_it_runs_knows_and_the_next_one_is_its_own() -> None:
    begun, gate, heard = threading.Event(), threading.Event(), list[bool]()

    def bring(_name: str, _uri: str, cancellation: Cancellation) -> None:
        begun.set()
        assert gate.wait(GUARD_SECONDS)
        heard.append(cancellation.is_cancelled)
        cancellation.check()

    resolver = Resolver(bring, has_folder=True)
    given_up = resolver.find("one")
    assert begun.wait(GUARD_SECONDS)
    given_up.cancellation.leave()
    next_one = resolver.find("one")
    assert next_one is not given_up
    gate.set()
    assert outcome(next_one)
    with pytest.raises(WorkCancelledError):
        outcome(given_up)
    assert sorted(heard) == [False, True]
    resolver.stop()


def test_one_clients_names_wait_behind_one_of_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_WORKERS", 1)
    monkeypatch.setattr(module, "MAX_LOOKS_OF_ONE", 20)
    bringer = Bringer("file:real")
    bringer.gate.clear()
    with resolving(bringer, template=None) as resolver:
        first = resolver.find("first", "flooder")
        while bringer.num_running < 1:
            threading.Event().wait(0.01)
        flood = [resolver.find(f"made-up{n}", "flooder") for n in range(20)]
        with pytest.raises(OverloadedError):
            outcome(resolver.find("one-more", "flooder"))
        real = resolver.find("real", "another")
        bringer.gate.set()
        assert outcome(real)
        assert not any(outcome(look) for look in (first, *flood))
    assert [name for name, _ in bringer.asked][:3] == ["first", "made-up0", "real"]


@given(
    st.lists(st.tuples(st.sampled_from(["ask", "leave", "serve"]), st.integers(0, 5), st.integers(0, 2)), max_size=60)
)
def test_whoever_waits_is_answered_and_nobody_else_is_looked_for(events: list[tuple[str, int, int]]) -> None:
    """Any order of asking, leaving and answering, with one worker that does one look at a time when it is told to."""
    turns, served = threading.Semaphore(0), threading.Semaphore(0)
    asked: list[str] = []

    def bring(name: str, _uri: str, cancellation: Cancellation) -> None:
        assert turns.acquire(timeout=GUARD_SECONDS)
        asked.append(name)
        served.release()
        cancellation.check()
        raise SourceNotFoundError(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NUM_WORKERS", 1)
        patch.setattr(module, "MISS_SECONDS", 0.0)
        resolver = Resolver(bring, has_folder=True)
        waiting: list[tuple[str, Look]] = []
        for verb, number, client in events:
            if verb == "ask":
                waiting.append((f"n{number}", resolver.find(f"n{number}", client)))
            elif verb == "leave" and waiting:
                waiting.pop(number % len(waiting))[1].cancellation.leave()
            elif verb == "serve" and any(not look.future.done() for _, look in waiting):
                turns.release()
                assert served.acquire(timeout=GUARD_SECONDS)
        wanted = {name for name, look in waiting if not look.future.done()}
        num_before = len(asked)
        turns.release(1000)
        for _, look in waiting:
            assert not outcome(look)
        left_over = set(asked[num_before:]) - wanted
        assert len(left_over) <= 1  # what was being looked for when its last asker left
        resolver.stop()
