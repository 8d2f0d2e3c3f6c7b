"""Memory for adapters: within its budget, never taken from who uses it, one load however many wait."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from fake_loader import SIZE, Loader, Make, claim, use, wait_state
from swaplora_adapters.errors import (
    AdapterFailedError,
    AdapterTooLargeError,
    InvalidAdapterError,
    MemoryFullError,
    StoppingError,
    StorageFailedError,
)
from swaplora_adapters.priority import NICENESS
from swaplora_adapters.registry.residency import memory_queue
from swaplora_adapters.registry.residency import residency as residency_module
from swaplora_adapters.registry.residency.residency import Residency
from swaplora_adapters.weights.served import AdapterWeights


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
    futures = [claim(residency, "a") for _ in range(16)]
    assert residency.state("a") == ("loading", None)
    loader.may_load.set()
    assert len({id(future.weights.result(30)["a"]) for future in futures}) == 1
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
    held = claim(residency, "a")
    held.weights.result(30)
    for digest in "bcdb":
        use(residency, digest)
    assert residency.state("a")[0] == "resident"
    residency.release(held)
    use(residency, "c")
    use(residency, "d")
    assert residency.state("a")[0] == "stored"


def test_a_failed_load_tells_every_waiter_and_is_remembered(make: Make, loader: Loader) -> None:
    residency = make(SIZE)
    loader.failures["a"] = InvalidAdapterError(["its file is damaged"])
    loader.may_load.clear()
    waiting = [claim(residency, "a") for _ in range(3)]
    loader.may_load.set()
    for future in waiting:
        with pytest.raises(AdapterFailedError, match="damaged"):
            future.weights.result(30)
    assert residency.state("a") == ("failed", "its file is damaged")
    with pytest.raises(AdapterFailedError, match="damaged"):
        claim(residency, "a").weights.result(30)
    assert loader.loaded == ["a"]

    del loader.failures["a"]
    residency.forget_failure("a")
    use(residency, "a")
    assert residency.state("a")[0] == "resident"


def test_an_adapter_larger_than_a_reduced_budget_is_at_fault_itself(make: Make, loader: Loader) -> None:
    residency = make(SIZE)
    for _ in range(2):
        with pytest.raises(AdapterFailedError, match="41"):
            claim(residency, "a", size=SIZE + 1).weights.result(30)
    assert residency.state("a")[0] == "failed"
    assert loader.loaded == []


def test_a_defect_is_reported_and_tried_again_by_the_next_request(make: Make, loader: Loader) -> None:
    residency = make(SIZE)
    defect = loader.failures["a"] = ZeroDivisionError("secret")
    with pytest.raises(AdapterFailedError, match=r"ZeroDivisionError\)[^:]*log") as failed:
        claim(residency, "a").weights.result(30)
    assert "secret" not in str(failed.value)
    assert residency.state("a") == ("stored", None)
    del loader.failures["a"]
    use(residency, "a")
    assert loader.reported == [defect]


def test_a_defect_that_nobody_asked_to_hear_of_is_printed(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[object] = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: printed.append(error[1]))
    loader.failures["a"] = ZeroDivisionError()
    residency = Residency(loader, SIZE, 30)
    with pytest.raises(AdapterFailedError):
        claim(residency, "a").weights.result(30)
    residency.close()
    assert printed == [loader.failures["a"]]


def test_a_bad_disk_is_told_as_that_and_tried_again(make: Make, loader: Loader) -> None:
    residency = make(SIZE)
    loader.failures["a"] = StorageFailedError("the disk that holds the adapters failed: EIO")
    with pytest.raises(StorageFailedError, match="EIO"):
        claim(residency, "a").weights.result(30)
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

    residency = Residency(load, 8 * SIZE, 30)
    for each in [claim(residency, digest) for digest in "abcdefgh"]:
        each.weights.result(30)
    residency.close()
    assert most == [True] * 8


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_loads_yield_to_the_threads_that_compute(loader: Loader) -> None:
    found: list[int] = []

    def load(digest: str) -> AdapterWeights:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return loader(digest)

    residency = Residency(load, SIZE, 30)
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
    held = claim(residency, "a")
    held.weights.result(30)
    residency.drop("a")
    assert residency.state("a")[0] == "draining"
    again = claim(residency, "a")
    assert again.weights.result(30)["a"] is held.weights.result()["a"]
    residency.release(held)
    assert (residency.state("a")[0], residency.resident_bytes) == ("resident", SIZE)
    residency.drop("a")
    residency.check_integrity()
    assert (residency.state("a")[0], residency.resident_bytes) == ("draining", SIZE)
    residency.release(again)
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
        claim(residency, "large", size=2 * SIZE).weights.result(30)  # at once: waiting would not help
    residency.pin({})
    for digest in "ef":
        use(residency, digest)
    assert residency.state("a")[0] == "stored"


def test_a_pin_that_found_no_room_is_loaded_when_there_is(
    make: Make, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    residency = make(SIZE, wait_seconds=0.1)
    held = claim(residency, "a")
    held.weights.result(30)
    residency.pin({"b": SIZE})
    wait_state(residency, "b", "stored")  # no longer loading
    residency.release(held)
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
        claim(residency, "c").weights.result(30)


def test_closing_leaves_nobody_waiting_and_no_thread(make: Make, loader: Loader) -> None:
    before = set(threading.enumerate())
    residency = make(2 * SIZE)
    held = claim(residency, "a")
    held.weights.result(30)
    loader.may_load.clear()
    loader.is_loading.clear()
    loading = claim(residency, "b")
    waiting = [claim(residency, digest) for digest in "cdefgh"]
    loader.is_loading.wait(30)
    threading.Timer(0.05, loader.may_load.set).start()
    residency.close()
    assert loading.weights.result(0)["b"].digest == "b"
    for each in [*waiting, claim(residency, "late")]:
        with pytest.raises(StoppingError, match="stopping"):
            each.weights.result(0)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("adapter-")]


def test_a_load_waits_for_room_until_somebody_is_done(make: Make) -> None:
    residency = make(SIZE)
    held = claim(residency, "a")
    held.weights.result(30)
    waiting = claim(residency, "b")
    assert residency.state("b") == ("loading", None)
    assert not waiting.weights.done()
    residency.release(held)
    assert waiting.weights.result(30)["b"].digest == "b"
    residency.release(waiting)


def test_several_are_had_together_or_not_at_all(make: Make, loader: Loader) -> None:
    residency = make(2 * SIZE)
    held = claim(residency, "a")
    held.weights.result(30)
    pair = claim(residency, "b", "c")
    assert (residency.state("b")[0], residency.resident_bytes) == ("loading", SIZE)
    use(residency, "d")  # in the place that is not enough for the pair
    residency.release(held)
    assert {digest: weights.digest for digest, weights in pair.weights.result(30).items()} == {"b": "b", "c": "c"}
    residency.release(pair)
    assert loader.loaded == ["a", "d", "b", "c"]


def test_a_failed_load_frees_what_was_to_be_had_beside_it_and_fails_all_who_wait_for_it(
    make: Make, loader: Loader
) -> None:
    residency = make(2 * SIZE)
    loader.failures["b"] = InvalidAdapterError(["its file is damaged"])
    loader.may_load.clear()
    pair, other, later = claim(residency, "a", "b"), claim(residency, "c", "d"), claim(residency, "b", "e")
    loader.may_load.set()
    for failed in (pair, later):
        with pytest.raises(AdapterFailedError, match="damaged"):
            failed.weights.result(30)
        assert failed.at_fault == "b"
        residency.release(failed)  # as whoever asked does, once it hears of it
    assert other.weights.result(30).keys() == {"c", "d"}
    residency.release(other)


def test_what_can_never_fit_together_is_told_in_numbers(make: Make, loader: Loader) -> None:
    residency = make(2 * SIZE)
    with pytest.raises(AdapterTooLargeError, match=r"3 adapters need 120 bytes.*gives all of its adapters 80"):
        claim(residency, "a", "b", "c").weights.result(0)
    residency.pin({"a": SIZE})
    wait_state(residency, "a", "resident")
    with pytest.raises(MemoryFullError, match=r"80 bytes of the 80 that adapters have, and pinned ones keep 40"):
        claim(residency, "b", "c").weights.result(0)
    use(residency, "a", "b")
    assert loader.loaded == ["a", "b"]


def test_what_nobody_waits_for_any_more_is_not_loaded(make: Make, loader: Loader) -> None:
    residency = make(3 * SIZE)
    loader.may_load.clear()
    loading, left = claim(residency, "a"), claim(residency, "b", "c")
    residency.release(left)
    loader.may_load.set()
    use(residency, "d")
    loading.weights.result(30)
    assert loader.loaded == ["a", "d"]
    residency.release(loading)


def test_everyones_time_runs_from_when_it_asked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(residency_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    residency = make(SIZE)
    held = claim(residency, "a")
    held.weights.result(30)
    waiting = [claim(residency, digest) for digest in "bcdefg"]
    clock.now = 20.0
    late = claim(residency, "late")
    clock.now = 31.0
    residency.pin({})  # wakes who looks at the clock
    for each in waiting:
        with pytest.raises(MemoryFullError, match=r"40 bytes of the 40 .* 30 seconds: .*adapter-memory-bytes"):
            each.weights.result(10)
    assert not late.weights.done()
    residency.release(held)
    late.weights.result(30)
    residency.release(late)


def test_a_load_that_takes_long_delays_nobodys_answer(make: Make, loader: Loader) -> None:
    residency = make(SIZE, wait_seconds=0.1)
    loader.may_load.clear()
    loading = claim(residency, "a")
    with pytest.raises(MemoryFullError):
        claim(residency, "b").weights.result(20)
    assert not loading.weights.done()
    loader.may_load.set()
    loading.weights.result(30)
    residency.release(loading)


def test_waiting_takes_no_thread_however_many_wait(make: Make) -> None:
    before = threading.active_count()
    residency = make(SIZE)
    held = claim(residency, "a")
    held.weights.result(30)
    waiting = {digest: claim(residency, digest) for digest in "bcdefgh"}
    assert threading.active_count() - before <= 2
    residency.release(held)
    for digest, each in waiting.items():
        assert each.weights.result(30)[digest].digest == digest
        residency.release(each)


def test_a_hot_adapter_does_not_keep_the_others_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_queue, "PATIENCE_SECONDS", 0.05)
    residency = make(SIZE)
    users = [claim(residency, "hot")]
    users[0].weights.result(30)
    cold = claim(residency, "cold")
    deadline = time.monotonic() + 30
    while not cold.weights.done():  # always one user of the hot one at least, as overlapping requests are
        users.append(claim(residency, "hot"))
        residency.release(users.pop(0))
        assert time.monotonic() < deadline
        time.sleep(0.005)
    residency.release(cold)
    for each in users:
        each.weights.result(30)
        residency.release(each)


def test_a_deleted_pin_that_waits_for_room_is_given_up(make: Make, loader: Loader) -> None:
    residency = make(SIZE)
    held = claim(residency, "a")
    held.weights.result(30)
    residency.pin({"b": SIZE})
    assert residency.state("b") == ("loading", None)
    residency.pin({})
    residency.drop("b")
    assert residency.state("b") == ("stored", None)
    residency.release(held)
    use(residency, "c")
    assert loader.loaded == ["a", "c"]
