"""Memory for adapters: within its budget, never taken from who uses it, one load however many wait."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from swaplora_adapters.artifact.weights import AdapterWeights, ModuleWeights
from swaplora_adapters.errors import AdapterFailedError, AdapterTooLargeError, InvalidAdapterError, MemoryFullError
from swaplora_adapters.registry import residency as residency_module
from swaplora_adapters.registry.residency import Residency

SIZE = 40


class Loader:
    """Counts loads, and holds or fails them as told."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.may_load = threading.Event()
        self.may_load.set()
        self.failures: dict[str, Exception] = {}

    def __call__(self, digest: str) -> AdapterWeights:
        self.may_load.wait(5)
        self.loaded.append(digest)
        if digest in self.failures:
            raise self.failures[digest]
        return AdapterWeights(digest, {"m": ModuleWeights(torch.zeros(1, 5), torch.zeros(5, 1))})


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def make(loader: Loader) -> Iterator[Callable[[int], Residency]]:
    made: list[Residency] = []

    def residency(budget: int) -> Residency:
        made.append(Residency(loader, budget))
        return made[-1]

    yield residency
    for one in made:
        one.check_integrity()
        one.close()


def use(residency: Residency, digest: str) -> None:
    weights = residency.retain(digest, SIZE)
    weights.result(5)
    residency.release(digest, weights)


def test_many_that_wait_for_one_adapter_load_it_once(make: Callable[[int], Residency], loader: Loader) -> None:
    residency = make(10 * SIZE)
    loader.may_load.clear()
    futures = [residency.retain("a", SIZE) for _ in range(16)]
    assert residency.state("a") == ("loading", None)
    loader.may_load.set()
    assert len({id(future.result(5)) for future in futures}) == 1
    assert loader.loaded == ["a"]
    assert residency.state("a") == ("resident", None)


def test_the_least_recently_used_goes_first(make: Callable[[int], Residency], loader: Loader) -> None:
    residency = make(2 * SIZE)
    for digest in "abac":
        use(residency, digest)
    assert [residency.state(digest)[0] for digest in "abc"] == ["resident", "stored", "resident"]
    assert residency.resident_bytes == 2 * SIZE


def test_what_is_in_use_is_never_evicted(make: Callable[[int], Residency], loader: Loader) -> None:
    residency = make(2 * SIZE)
    held = residency.retain("a", SIZE)
    held.result(5)
    for digest in "bcdb":
        use(residency, digest)
    assert residency.state("a")[0] == "resident"
    residency.release("a", held)
    use(residency, "c")
    use(residency, "d")
    assert residency.state("a")[0] == "stored"


def test_a_load_waits_for_room_until_somebody_is_done(make: Callable[[int], Residency], loader: Loader) -> None:
    residency = make(SIZE)
    held = residency.retain("a", SIZE)
    held.result(5)
    waiting = residency.retain("b", SIZE)
    with pytest.raises(TimeoutError):
        waiting.result(0.2)
    residency.release("a", held)
    assert waiting.result(5).digest == "b"
    residency.release("b", waiting)


def test_a_failed_load_tells_every_waiter_and_is_remembered(make: Callable[[int], Residency], loader: Loader) -> None:
    residency = make(SIZE)
    loader.failures["a"] = InvalidAdapterError(["its file is damaged"])
    loader.may_load.clear()
    waiting = [residency.retain("a", SIZE) for _ in range(3)]
    loader.may_load.set()
    for future in waiting:
        with pytest.raises(InvalidAdapterError, match="damaged"):
            future.result(5)
    assert residency.state("a") == ("failed", "its file is damaged")
    with pytest.raises(AdapterFailedError, match="damaged"):
        residency.retain("a", SIZE).result(5)
    assert loader.loaded == ["a"]

    del loader.failures["a"]
    residency.forget_failure("a")
    use(residency, "a")
    assert residency.state("a")[0] == "resident"


def test_what_may_pass_is_tried_again_by_the_next_request(make: Callable[[int], Residency], loader: Loader) -> None:
    residency = make(SIZE)
    loader.failures["a"] = ZeroDivisionError()
    with pytest.raises(MemoryFullError, match="ZeroDivisionError"):
        residency.retain("a", SIZE).result(5)
    del loader.failures["a"]
    use(residency, "a")


def test_what_can_never_fit_is_refused(make: Callable[[int], Residency]) -> None:
    with pytest.raises(AdapterTooLargeError, match="41"):
        make(40).check_size(41)


def test_a_dropped_adapter_frees_its_memory(make: Callable[[int], Residency]) -> None:
    residency = make(4 * SIZE)
    use(residency, "a")
    residency.drop("a")
    assert (residency.resident_bytes, residency.state("a")[0]) == (0, "stored")


def test_a_load_that_waits_long_makes_what_is_in_use_retire(
    make: Callable[[int], Residency], loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency_module, "_PATIENCE_SECONDS", 0.05)
    residency = make(2 * SIZE)
    held = {digest: residency.retain(digest, SIZE) for digest in "ab"}
    for weights in held.values():
        weights.result(5)
    waiting = residency.retain("c", SIZE)
    while residency.state("a")[0] != "draining":  # the least recently used
        time.sleep(0.01)
    again = residency.retain("a", SIZE)  # a new user waits for a fresh load, behind c
    assert again is not held["a"]
    assert not waiting.done()
    residency.release("a", held["a"])
    assert waiting.result(5).digest == "c"
    residency.release("b", held["b"])
    assert again.result(5).digest == "a"
    assert loader.loaded == ["a", "b", "c", "a"]
    for digest, weights in [("c", waiting), ("a", again)]:
        residency.release(digest, weights)


def test_a_hot_adapter_does_not_keep_the_others_out(
    make: Callable[[int], Residency], loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency_module, "_PATIENCE_SECONDS", 0.05)
    residency = make(SIZE)
    users = [residency.retain("hot", SIZE)]
    users[0].result(5)
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
        weights.result(5)
        residency.release("hot", weights)


def test_a_small_load_passes_a_large_one_that_still_has_patience(
    make: Callable[[int], Residency], loader: Loader
) -> None:
    residency = make(3 * SIZE)
    held = residency.retain("a", 2 * SIZE)
    held.result(5)
    large, small = residency.retain("large", 2 * SIZE), residency.retain("small", SIZE)
    assert small.result(5).digest == "small"
    assert not large.done()
    residency.release("a", held)
    residency.release("small", small)
    large.result(5)
    residency.release("large", large)


def test_what_is_pinned_is_loaded_and_stays(make: Callable[[int], Residency], loader: Loader) -> None:
    residency = make(2 * SIZE)
    residency.pin({"a": SIZE})
    while residency.state("a")[0] != "resident":
        time.sleep(0.01)
    for digest in "bcd":
        use(residency, digest)
    assert residency.state("a")[0] == "resident"
    with pytest.raises(MemoryFullError, match="pinned"):
        residency.check_pins({"a": SIZE, "b": SIZE, "c": SIZE})
    with pytest.raises(MemoryFullError, match="pinned"):
        residency.retain("large", 2 * SIZE).result(5)  # at once: waiting would not help
    residency.pin({})
    for digest in "ef":
        use(residency, digest)
    assert residency.state("a")[0] == "stored"


def test_a_load_that_finds_no_room_in_time_says_so(
    make: Callable[[int], Residency], loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency_module, "_ROOM_TIMEOUT_SECONDS", 0.1)
    residency = make(SIZE)
    held = residency.retain("a", SIZE)
    held.result(5)
    with pytest.raises(MemoryFullError, match="adapter-memory-bytes"):
        residency.retain("b", SIZE).result(5)
    residency.release("a", held)
    use(residency, "b")


def test_closing_leaves_nobody_waiting(make: Callable[[int], Residency], loader: Loader) -> None:
    residency = make(SIZE)
    held = residency.retain("a", SIZE)
    held.result(5)
    waiting = [residency.retain(digest, SIZE) for digest in "bcdefgh"]
    residency.close()
    for weights in waiting:
        with pytest.raises(MemoryFullError):
            weights.result(5)
