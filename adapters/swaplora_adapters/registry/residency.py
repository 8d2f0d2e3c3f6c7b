"""Which versions are in memory: a byte budget, least recently used first out, what is in use or pinned never.

Versions are known by digest alone, so two names with the same bytes share one copy. One thread gives room to those that
wait for it, another does the loads, one per digest however many wait for it, and one at a time, so that the model keeps
its cores.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from swaplora_adapters.artifact.served import AdapterWeights
from swaplora_adapters.errors import (
    AdapterError,
    AdapterFailedError,
    AdapterTooLargeError,
    InvalidAdapterError,
    MemoryFullError,
)
from swaplora_adapters.registry.room import Entry, Room

NICENESS = 10  # of the thread that loads: beside a busy engine it gets a tenth of a core


def _show(error: BaseException) -> None:
    sys.excepthook(type(error), error, error.__traceback__)


class Residency:
    """Owns the memory of adapters. Thread-safe; `retain` and `release` pair up, and `drop` forgets for good."""

    def __init__(
        self, load: Callable[[str], AdapterWeights], budget: int, report: Callable[[BaseException], None] = _show
    ) -> None:
        """`load` reads one digest's weights into memory; `budget` is in bytes of weights.

        `report` is told what went wrong in a load that nobody foresaw.
        """
        self._load = load
        self._report = report
        self._room = Room(budget)
        self._reasons: dict[str, str] = {}
        self._is_closed = False
        self._changed = threading.Condition()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="adapter-load", initializer=_yield_to_steps)
        self._dispatcher = threading.Thread(target=self._dispatch, name="adapter-room", daemon=True)
        self._dispatcher.start()

    @property
    def resident_bytes(self) -> int:
        with self._changed:
            return self._room.used_bytes

    def check_size(self, nbytes: int) -> None:
        """Raise AdapterTooLargeError for what could never be loaded."""
        budget = self._room.budget
        if nbytes > budget:
            raise AdapterTooLargeError(
                f"the adapter needs {nbytes} bytes of memory, and the server gives all of its adapters {budget}"
            )

    def check_pins(self, pinned: Mapping[str, int]) -> None:
        """Raise MemoryFullError unless all of these, digest → bytes, fit at once."""
        total, budget = sum(pinned.values()), self._room.budget
        if total > budget:
            raise MemoryFullError(
                f"all pinned adapters would need {total} bytes of the {budget} that adapters have: unpin one"
            )

    def pin(self, pinned: Mapping[str, int]) -> None:
        """Keep exactly these in memory, and load those that are not there yet.

        Where all of them do not fit, the first ones are kept, and room is left for each of the others by turns.
        """
        with self._changed:
            self._room.pin(pinned)
            self._prefetch_missing()
            self._changed.notify_all()

    def pins_not_kept(self) -> list[str]:
        """Digests that are pinned and may be evicted all the same, because all pins together exceed the budget."""
        with self._changed:
            return [digest for digest in self._room.pinned if digest not in self._room.kept]

    def state(self, digest: str) -> tuple[str, str | None]:
        """stored, loading, resident, draining or failed, and why it failed."""
        with self._changed:
            entry = self._room.find(digest)
            if entry is not None:
                return ("resident" if entry.weights.done() else "loading"), None
            if self._room.is_draining(digest):
                return "draining", None
            reason = self._reasons.get(digest)
            return ("failed", reason) if reason else ("stored", None)

    def forget_failure(self, digest: str) -> None:
        """Let the next `retain` try again."""
        with self._changed:
            self._reasons.pop(digest, None)

    def retain(self, digest: str, nbytes: int) -> Future[AdapterWeights]:
        """Count one more user and have it loaded if it is not there. Returns at once.

        The future fails with MemoryFullError, StorageFailedError, or AdapterFailedError if the stored version is at
        fault; that one is remembered, and fails at once until it is dropped.
        """
        with self._changed:
            entry = self._room.find(digest)
            if entry is None:
                entry = Entry(digest, nbytes, time.monotonic())
                refusal = self._refusal(digest, nbytes)
                if refusal is not None:
                    entry.weights.set_exception(refusal)
                    return entry.weights
                self._room.add(entry)
                self._changed.notify_all()
            self._room.touch(digest)
            entry.num_users += 1
            return entry.weights

    def release(self, digest: str, weights: Future[AdapterWeights]) -> None:
        """Count one user less; `weights` is what `retain` gave it."""
        with self._changed:
            entry = self._room.holder(digest, weights)
            if entry is not None:
                entry.num_users -= 1
                self._room.settle(entry)
                self._prefetch_missing()
                self._changed.notify_all()

    def drop(self, digest: str) -> None:
        """Forget a version that nobody will ask for again, its failure included."""
        with self._changed:
            self._reasons.pop(digest, None)
            entry = self._room.find(digest)
            if entry is not None:
                self._room.retire(entry)
                self._changed.notify_all()

    def close(self) -> None:
        """Let the load that runs end, and fail all others."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._dispatcher.join()
        self._loader.shutdown(wait=True, cancel_futures=True)
        with self._changed:
            for entry in self._room.copies():
                if not entry.weights.done():
                    self._fail(entry, MemoryFullError("the server is stopping"))

    def check_integrity(self) -> None:
        """Raise RuntimeError if a count went below zero, the budget is exceeded, or what retired stays for nobody."""
        with self._changed:
            self._room.check_integrity()

    def _refusal(self, digest: str, nbytes: int) -> AdapterError | None:
        """Why nobody needs to try to load it."""
        if self._is_closed:
            return MemoryFullError("the server is stopping")
        try:
            self.check_size(nbytes)
        except AdapterTooLargeError as error:  # the budget was larger when it was uploaded
            self._reasons[digest] = str(error)
        return AdapterFailedError(self._reasons[digest]) if digest in self._reasons else None

    def _prefetch_missing(self) -> None:
        """Have loaded what is pinned and could not be until now, unless it is itself at fault."""
        for digest, nbytes in self._room.kept.items():
            if self._room.find(digest) is None and digest not in self._reasons and not self._is_closed:
                weights = self.retain(digest, nbytes)
                weights.add_done_callback(partial(self.release, digest))

    def _dispatch(self) -> None:
        """A thread's life: give room to those that wait, or tell them that there is none."""
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                if (entry := self._room.next_in(now)) is not None:
                    if not entry.weights.done():
                        self._loader.submit(self._fill, entry)
                elif (entry := self._room.next_hopeless(now)) is not None:
                    self._fail(entry, _no_room())
                else:
                    self._changed.wait(self._room.seconds_to_wait(now))

    def _fill(self, entry: Entry) -> None:
        """The other thread's job: load, publish by one assignment; or tell every waiter why not."""
        try:
            weights = self._load(entry.digest)
        except (InvalidAdapterError, AdapterFailedError) as error:
            self._fail(entry, AdapterFailedError(str(error)), is_lasting=True)
        except AdapterError as error:
            self._fail(entry, error)
        except Exception as error:  # noqa: BLE001 - the thread's boundary: a waiter must never hang
            self._fail(entry, _defect(error))
            self._report(error)
        else:
            with self._changed:
                entry.nbytes = min(entry.nbytes, weights.nbytes)  # bfloat16 takes less than was foreseen
                entry.weights.set_result(weights)
                self._room.settle(entry)
                self._changed.notify_all()

    def _fail(self, entry: Entry, error: AdapterError, *, is_lasting: bool = False) -> None:
        """Only what is wrong with the files is lasting; the rest may have passed by the next request."""
        with self._changed:
            if is_lasting and self._room.find(entry.digest) is entry:
                self._reasons[entry.digest] = str(error)
            self._room.forget(entry)
            entry.weights.set_exception(error)
            self._changed.notify_all()


def _yield_to_steps() -> None:
    """Lower this thread's priority, where threads have one of their own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS))


def _no_room() -> MemoryFullError:
    return MemoryFullError("adapters in use or pinned fill the memory; raise --adapter-memory-bytes")


def _defect(error: Exception) -> AdapterFailedError:
    return AdapterFailedError(f"the adapter could not be loaded ({type(error).__name__}); the server's log says more")
