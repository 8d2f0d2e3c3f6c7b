"""Who waits for room in memory: in order, not too long, never starved, and never for what is in memory already."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from resident import SIZE, Loader, Make, use, wait_state
from swaplora_adapters.errors import MemoryFullError
from swaplora_adapters.registry import residency as residency_module
from swaplora_adapters.registry import room


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def make(loader: Loader) -> Iterator[Make]:
    with ExitStack() as stack:
        yield Make(loader, stack)


def test_a_load_waits_for_room_until_somebody_is_done(make: Make, loader: Loader) -> None:
    residency = make(SIZE)
    held = residency.retain("a", SIZE)
    held.result(30)
    waiting = residency.retain("b", SIZE)
    with pytest.raises(TimeoutError):
        waiting.result(0.2)
    residency.release("a", held)
    assert waiting.result(30).digest == "b"
    residency.release("b", waiting)


def test_a_load_that_waits_long_makes_what_is_in_use_retire(
    make: Make, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 0.05)
    residency = make(2 * SIZE)
    held = {digest: residency.retain(digest, SIZE) for digest in "ab"}
    for weights in held.values():
        weights.result(30)
    waiting = residency.retain("c", SIZE)
    wait_state(residency, "a", "draining")  # the least recently used
    again = residency.retain("a", SIZE)  # a new user waits for a fresh load, behind c
    assert again is not held["a"]
    assert not waiting.done()
    residency.release("a", held["a"])
    assert waiting.result(30).digest == "c"
    residency.release("b", held["b"])
    assert again.result(30).digest == "a"
    assert loader.loaded == ["a", "b", "c", "a"]
    for digest, weights in [("c", waiting), ("a", again)]:
        residency.release(digest, weights)


def test_a_hot_adapter_does_not_keep_the_others_out(
    make: Make, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 0.05)
    residency = make(SIZE)
    users = [residency.retain("hot", SIZE)]
    users[0].result(30)
    cold = residency.retain("cold", SIZE)
    deadline = time.monotonic() + 30
    while not cold.done():  # always one user of the hot one at least, as overlapping requests are
        users.append(residency.retain("hot", SIZE))
        if users[-1] is not users[0] or len(users) > 2:
            residency.release("hot", users.pop(0))
        assert time.monotonic() < deadline
        time.sleep(0.005)
    residency.release("cold", cold)
    for weights in users:
        weights.result(30)
        residency.release("hot", weights)


def test_a_small_load_passes_a_large_one_that_still_has_patience(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 600)
    monkeypatch.setattr(room, "TIMEOUT_SECONDS", 600)
    residency = make(3 * SIZE)
    held = residency.retain("a", 2 * SIZE)
    held.result(30)
    large, small = residency.retain("large", 2 * SIZE), residency.retain("small", SIZE)
    assert small.result(30).digest == "small"
    assert not large.done()
    residency.release("a", held)
    residency.release("small", small)
    large.result(30)
    residency.release("large", large)


def test_an_adapter_that_made_room_in_vain_serves_again(
    make: Make, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(room, "TIMEOUT_SECONDS", 0.2)
    residency = make(SIZE)
    held = residency.retain("hot", SIZE)
    held.result(30)
    with pytest.raises(MemoryFullError):
        residency.retain("cold", SIZE).result(30)
    assert residency.state("hot")[0] == "draining"
    again = residency.retain("hot", SIZE)
    assert again.result(30) is held.result()
    assert (residency.state("hot")[0], residency.resident_bytes) == ("resident", SIZE)
    residency.release("hot", again)
    residency.release("hot", held)
    use(residency, "hot")
    use(residency, "cold")
    assert loader.loaded == ["hot", "cold"]


def test_who_waits_behind_one_that_gives_up_gets_the_copy_that_is_still_in_memory(
    make: Make, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 0.05)
    residency = make(SIZE)
    held = residency.retain("hot", SIZE)
    held.result(30)
    cold = residency.retain("cold", SIZE)
    wait_state(residency, "hot", "draining")
    again = residency.retain("hot", SIZE)
    assert residency.state("hot")[0] == "loading"
    residency.release("cold", cold)  # its only user left: nobody waits for it
    assert again.result(30) is held.result()
    assert (residency.state("cold")[0], loader.loaded) == ("stored", ["hot"])
    residency.release("hot", again)
    residency.release("hot", held)


def test_memory_that_was_taken_over_is_in_use_until_the_first_users_are_done_too(
    make: Make, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 0.05)
    residency = make(SIZE)
    users = [residency.retain("hot", SIZE)]
    for _ in range(2):
        users[-1].result(30)
        cold = residency.retain("cold", SIZE)
        wait_state(residency, "hot", "draining")
        residency.release("cold", cold)
        users.append(residency.retain("hot", SIZE))
    users[-1].result(30)
    residency.release("hot", users.pop())
    residency.release("hot", users.pop())
    residency.check_integrity()
    cold = residency.retain("cold", SIZE)
    wait_state(residency, "hot", "draining")
    assert (residency.resident_bytes, loader.loaded) == (SIZE, ["hot"])
    residency.release("hot", users.pop())
    assert cold.result(30).digest == "cold"
    residency.release("cold", cold)


def test_room_that_is_free_is_given_however_many_wait_for_more(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 600)
    monkeypatch.setattr(room, "TIMEOUT_SECONDS", 600)
    before = threading.active_count()
    residency = make(3 * SIZE)
    held = residency.retain("a", 2 * SIZE)
    held.result(30)
    waiting = {digest: residency.retain(digest, 2 * SIZE) for digest in "bcdefgh"}
    use(residency, "small")
    assert not any(weights.done() for weights in waiting.values())
    assert threading.active_count() - before <= 2
    residency.release("a", held)
    for digest, weights in waiting.items():
        assert weights.result(30).digest == digest
        residency.release(digest, weights)


def test_everyones_time_runs_from_when_it_asked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(residency_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    residency = make(SIZE)
    held = residency.retain("a", SIZE)
    held.result(30)
    waiting = [residency.retain(digest, SIZE) for digest in "bcdefg"]
    clock.now = 20.0
    late = residency.retain("late", SIZE)
    clock.now = 31.0
    residency.pin({})  # wakes who looks at the clock
    for weights in waiting:
        with pytest.raises(MemoryFullError, match="adapter-memory-bytes"):
            weights.result(10)
    assert not late.done()
    residency.release("a", held)
    late.result(30)
    residency.release("late", late)


def test_a_load_that_takes_long_delays_nobodys_answer(
    make: Make, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "TIMEOUT_SECONDS", 0.1)
    residency = make(SIZE)
    loader.may_load.clear()
    loading = residency.retain("a", SIZE)
    with pytest.raises(MemoryFullError):
        residency.retain("b", SIZE).result(20)
    assert not loading.done()
    loader.may_load.set()
    loading.result(30)
    residency.release("a", loading)


def test_a_load_that_finds_no_room_in_time_says_so(make: Make, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "TIMEOUT_SECONDS", 0.1)
    residency = make(SIZE)
    held = residency.retain("a", SIZE)
    held.result(30)
    with pytest.raises(MemoryFullError, match="adapter-memory-bytes"):
        residency.retain("b", SIZE).result(30)
    residency.release("a", held)
    use(residency, "b")
