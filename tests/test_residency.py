"""Memory for adapters: within its budget, never taken from who uses it, one load however many wait."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from resident import SIZE, Loader, Make, use, wait_state
from swaplora_adapters.artifact.served import AdapterWeights
from swaplora_adapters.errors import (
    AdapterFailedError,
    AdapterTooLargeError,
    InvalidAdapterError,
    MemoryFullError,
    StorageFailedError,
)
from swaplora_adapters.registry import room
from swaplora_adapters.registry.residency import NICENESS, Residency


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def make(loader: Loader) -> Iterator[Make]:
    with ExitStack() as stack:
        yield Make(loader, stack)


def test_many_that_wait_for_one_adapter_load_it_once(make: Make, loader: Loader) -> None:
    residency = make(10 * SIZE)
    loader.may_load.clear()
    futures = [residency.retain("a", SIZE) for _ in range(16)]
    assert residency.state("a") == ("loading", None)
    loader.may_load.set()
    assert len({id(future.result(30)) for future in futures}) == 1
    assert loader.loaded == ["a"]
    assert residency.state("a") == ("resident", None)


def test_the_least_recently_used_goes_first(make: Make, loader: Loader) -> None:
    residency = make(2 * SIZE)
    for digest in "abac":
        use(residency, digest)
    assert [residency.state(digest)[0] for digest in "abc"] == ["resident", "stored", "resident"]
    assert residency.resident_bytes == 2 * SIZE


def test_what_is_in_use_is_never_evicted(make: Make, loader: Loader) -> None:
    residency = make(2 * SIZE)
    held = residency.retain("a", SIZE)
    held.result(30)
    for digest in "bcdb":
        use(residency, digest)
    assert residency.state("a")[0] == "resident"
    residency.release("a", held)
    use(residency, "c")
    use(residency, "d")
    assert residency.state("a")[0] == "stored"


def test_a_failed_load_tells_every_waiter_and_is_remembered(make: Make, loader: Loader) -> None:
    residency = make(SIZE)
    loader.failures["a"] = InvalidAdapterError(["its file is damaged"])
    loader.may_load.clear()
    waiting = [residency.retain("a", SIZE) for _ in range(3)]
    loader.may_load.set()
    for future in waiting:
        with pytest.raises(AdapterFailedError, match="damaged"):
            future.result(30)
    assert residency.state("a") == ("failed", "its file is damaged")
    with pytest.raises(AdapterFailedError, match="damaged"):
        residency.retain("a", SIZE).result(30)
    assert loader.loaded == ["a"]

    del loader.failures["a"]
    residency.forget_failure("a")
    use(residency, "a")
    assert residency.state("a")[0] == "resident"


def test_an_adapter_larger_than_a_reduced_budget_is_at_fault_itself(make: Make, loader: Loader) -> None:
    residency = make(SIZE)
    for _ in range(2):
        with pytest.raises(AdapterFailedError, match="41"):
            residency.retain("a", SIZE + 1).result(30)
    assert residency.state("a")[0] == "failed"
    assert loader.loaded == []


def test_a_defect_is_reported_and_tried_again_by_the_next_request(make: Make, loader: Loader) -> None:
    residency = make(SIZE)
    defect = loader.failures["a"] = ZeroDivisionError("secret")
    with pytest.raises(AdapterFailedError, match=r"ZeroDivisionError\)[^:]*log") as failed:
        residency.retain("a", SIZE).result(30)
    assert "secret" not in str(failed.value)
    assert residency.state("a") == ("stored", None)
    del loader.failures["a"]
    use(residency, "a")
    assert loader.reported == [defect]


def test_a_defect_that_nobody_asked_to_hear_of_is_printed(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[object] = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: printed.append(error[1]))
    loader.failures["a"] = ZeroDivisionError()
    residency = Residency(loader, SIZE)
    with pytest.raises(AdapterFailedError):
        residency.retain("a", SIZE).result(30)
    residency.close()
    assert printed == [loader.failures["a"]]


def test_a_bad_disk_is_told_as_that_and_tried_again(make: Make, loader: Loader) -> None:
    residency = make(SIZE)
    loader.failures["a"] = StorageFailedError("the disk that holds the adapters failed: EIO")
    with pytest.raises(StorageFailedError, match="EIO"):
        residency.retain("a", SIZE).result(30)
    del loader.failures["a"]
    use(residency, "a")
    assert loader.reported == []


def test_loads_run_one_at_a_time(loader: Loader) -> None:
    running, most = threading.Semaphore(1), []

    def load(digest: str) -> AdapterWeights:
        most.append(running.acquire(blocking=False))
        time.sleep(0.01)
        running.release()
        return loader(digest)

    residency = Residency(load, 8 * SIZE)
    for weights in [residency.retain(digest, SIZE) for digest in "abcdefgh"]:
        weights.result(30)
    residency.close()
    assert most == [True] * 8


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_loads_yield_to_the_threads_that_compute(loader: Loader) -> None:
    found: list[int] = []

    def load(digest: str) -> AdapterWeights:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return loader(digest)

    residency = Residency(load, SIZE)
    try:
        use(residency, "a")
    finally:
        residency.close()
    assert found == [min(19, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + NICENESS)]


def test_what_can_never_fit_is_refused(make: Make) -> None:
    with pytest.raises(AdapterTooLargeError, match="41"):
        make(40).check_size(41)


def test_a_dropped_adapter_frees_its_memory(make: Make) -> None:
    residency = make(4 * SIZE)
    use(residency, "a")
    residency.drop("a")
    assert (residency.resident_bytes, residency.state("a")[0]) == (0, "stored")


def test_a_dropped_adapter_that_is_uploaded_again_is_shared_with_who_still_uses_it(make: Make, loader: Loader) -> None:
    residency = make(SIZE)
    held = residency.retain("a", SIZE)
    held.result(30)
    residency.drop("a")
    assert residency.state("a")[0] == "draining"
    again = residency.retain("a", SIZE)
    assert again.result(30) is held.result()
    residency.release("a", held)
    assert (residency.state("a")[0], residency.resident_bytes) == ("resident", SIZE)
    residency.drop("a")
    residency.check_integrity()
    assert (residency.state("a")[0], residency.resident_bytes) == ("draining", SIZE)
    residency.release("a", again)
    assert (residency.state("a")[0], residency.resident_bytes, loader.loaded) == ("stored", 0, ["a"])


def test_what_is_pinned_is_loaded_and_stays(make: Make, loader: Loader) -> None:
    residency = make(2 * SIZE)
    residency.pin({"a": SIZE})
    wait_state(residency, "a", "resident")
    for digest in "bcd":
        use(residency, digest)
    assert residency.state("a")[0] == "resident"
    with pytest.raises(MemoryFullError, match="pinned"):
        residency.check_pins({"a": SIZE, "b": SIZE, "c": SIZE})
    with pytest.raises(MemoryFullError, match="pinned"):
        residency.retain("large", 2 * SIZE).result(30)  # at once: waiting would not help
    residency.pin({})
    for digest in "ef":
        use(residency, digest)
    assert residency.state("a")[0] == "stored"


def test_a_pin_that_found_no_room_is_loaded_when_there_is(
    make: Make, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "TIMEOUT_SECONDS", 0.1)
    residency = make(SIZE)
    held = residency.retain("a", SIZE)
    held.result(30)
    residency.pin({"b": SIZE})
    wait_state(residency, "b", "stored")  # no longer loading
    residency.release("a", held)
    wait_state(residency, "b", "resident")


def test_a_pin_that_failed_for_a_passing_reason_is_tried_again_later_but_not_at_once(
    make: Make, loader: Loader
) -> None:
    residency = make(2 * SIZE)
    loader.failures["a"] = StorageFailedError("the disk that holds the adapters failed: EIO")
    residency.pin({"a": SIZE})
    wait_state(residency, "a", "stored")
    residency.pin({"a": SIZE})
    wait_state(residency, "a", "stored")
    assert loader.loaded == ["a", "a"]
    del loader.failures["a"]
    use(residency, "b")
    wait_state(residency, "a", "resident")


def test_pins_that_do_not_fit_together_are_served_by_turns(make: Make, loader: Loader) -> None:
    residency = make(2 * SIZE)
    residency.pin(dict.fromkeys("abc", SIZE) | {"huge": 3 * SIZE})
    assert residency.pins_not_kept() == ["b", "c", "huge"]
    for digest in "abcabcda":
        use(residency, digest)
    assert loader.loaded == ["a", *"bcbcd"]  # the first one stays
    residency.pin({"a": SIZE, "b": SIZE})
    assert residency.pins_not_kept() == []
    wait_state(residency, "b", "resident")
    with pytest.raises(MemoryFullError, match="pinned"):
        residency.retain("c", SIZE).result(30)


def test_closing_leaves_nobody_waiting_and_no_thread(make: Make, loader: Loader) -> None:
    before = set(threading.enumerate())
    residency = make(2 * SIZE)
    held = residency.retain("a", SIZE)
    held.result(30)
    loader.may_load.clear()
    loader.is_loading.clear()
    loading = residency.retain("b", SIZE)
    waiting = [residency.retain(digest, SIZE) for digest in "cdefgh"]
    loader.is_loading.wait(30)
    threading.Timer(0.05, loader.may_load.set).start()
    residency.close()
    assert loading.result(0).digest == "b"
    for weights in [*waiting, residency.retain("late", SIZE)]:
        with pytest.raises(MemoryFullError, match="stopping"):
            weights.result(0)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("adapter-")]
