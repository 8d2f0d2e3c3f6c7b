"""Which versions are in memory: a byte budget, least recently used first out, what is in use or pinned never.

Versions are known by digest alone, so two names with the same bytes share one copy. Loads run in worker threads, one
per digest however many wait for it, and one at a time, so that the model keeps its cores.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from swaplora_adapters.artifact.weights import AdapterWeights
from swaplora_adapters.errors import (
    AdapterError,
    AdapterFailedError,
    AdapterTooLargeError,
    InvalidAdapterError,
    MemoryFullError,
)

_ROOM_TIMEOUT_SECONDS = 30.0
_PATIENCE_SECONDS = 0.5  # before the one who waits longest comes first, and what is in use has to make room
_NUM_WORKERS = 4  # nearly all of them only wait for room


@dataclass(slots=True, eq=False)
class _Entry:
    digest: str
    nbytes: int
    weights: Future[AdapterWeights] = field(default_factory=Future)
    num_users: int = 0
    has_room: bool = False  # its bytes count against the budget
    waits_since: float = 0.0

    @property
    def is_idle(self) -> bool:
        return self.weights.done() and not self.num_users


class Residency:
    """Owns the memory of adapters. Thread-safe; `retain` and `release` pair up, and `drop` forgets for good.

    When a load has waited its patience for room, the least recently used adapters retire: the requests that run on them
    end on them, new ones wait for a fresh load. So no adapter keeps the others out by never being idle.
    """

    def __init__(self, load: Callable[[str], AdapterWeights], budget: int) -> None:
        """`load` reads one digest's weights into memory; `budget` is in bytes of weights."""
        self._load = load
        self._budget = budget
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._retired: list[_Entry] = []  # in memory only until their users are done
        self._waiting: deque[_Entry] = deque()  # for room, in order
        self._pinned: dict[str, int] = {}
        self._reasons: dict[str, str] = {}
        self._is_closed = False
        self._changed = threading.Condition()
        self._one_at_a_time = threading.Lock()
        self._workers = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="adapter-load")

    @property
    def resident_bytes(self) -> int:
        with self._changed:
            return self._used_bytes()

    def check_size(self, nbytes: int) -> None:
        """Raise AdapterTooLargeError for what could never be loaded."""
        if nbytes > self._budget:
            raise AdapterTooLargeError(
                f"the adapter needs {nbytes} bytes of memory, and the server gives all of its adapters {self._budget}"
            )

    def check_pins(self, pinned: Mapping[str, int]) -> None:
        """Raise MemoryFullError unless all of these, digest → bytes, fit at once."""
        total = sum(pinned.values())
        if total > self._budget:
            raise MemoryFullError(
                f"all pinned adapters would need {total} bytes of the {self._budget} that adapters have: unpin one"
            )

    def pin(self, pinned: Mapping[str, int]) -> None:
        """Keep exactly these in memory, and load those that are not there yet."""
        with self._changed:
            new = {digest: nbytes for digest, nbytes in pinned.items() if digest not in self._pinned}
            self._pinned = dict(pinned)
            self._changed.notify_all()
        for digest, nbytes in new.items():
            self._prefetch(digest, nbytes)

    def state(self, digest: str) -> tuple[str, str | None]:
        """stored, loading, resident, draining or failed, and why it failed."""
        with self._changed:
            entry = self._entries.get(digest)
            if entry is not None:
                return ("resident" if entry.weights.done() else "loading"), None
            if any(entry.digest == digest for entry in self._retired):
                return "draining", None
            reason = self._reasons.get(digest)
            return ("failed", reason) if reason else ("stored", None)

    def forget_failure(self, digest: str) -> None:
        """Let the next `retain` try again."""
        with self._changed:
            self._reasons.pop(digest, None)

    def retain(self, digest: str, nbytes: int) -> Future[AdapterWeights]:
        """Count one more user and start the load if nobody has.

        The future fails with the load's AdapterError; a version that failed before fails at once, until it is dropped.
        """
        with self._changed:
            entry = self._entries.get(digest)
            if entry is None:
                entry = _Entry(digest, nbytes)
                if digest in self._reasons:
                    entry.weights.set_exception(AdapterFailedError(self._reasons[digest]))
                    return entry.weights
                self._entries[digest] = entry
                self._workers.submit(self._fill, entry)
            self._entries.move_to_end(digest)
            entry.num_users += 1
            return entry.weights

    def release(self, digest: str, weights: Future[AdapterWeights]) -> None:
        """Count one user less; `weights` is what `retain` gave it."""
        with self._changed:
            entry = next((entry for entry in self._known(digest) if entry.weights is weights), None)
            if entry is not None:
                entry.num_users -= 1
                self._settle(entry)

    def drop(self, digest: str) -> None:
        """Forget a version that nobody will ask for again, its failure included."""
        with self._changed:
            self._reasons.pop(digest, None)
            entry = self._entries.get(digest)
            if entry is not None:
                self._retire(entry)

    def close(self) -> None:
        """Let the load that runs end, and fail all others."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._workers.shutdown(wait=True, cancel_futures=True)
        for entry in self._all():
            if not entry.weights.done():
                entry.weights.set_exception(MemoryFullError("the server is stopping"))

    def check_integrity(self) -> None:
        """Raise RuntimeError if a count went below zero, the budget is exceeded, or what retired stays for nobody."""
        with self._changed:
            if any(entry.num_users < 0 for entry in self._all()):
                raise RuntimeError("an adapter was released more often than retained")
            if self._used_bytes() > self._budget:
                raise RuntimeError("resident adapters exceed their budget")
            if any(entry.is_idle for entry in self._retired):
                raise RuntimeError("a retired adapter is still in memory, and nobody uses it")

    def _all(self) -> Iterable[_Entry]:
        return [*self._entries.values(), *self._retired]

    def _known(self, digest: str) -> Iterable[_Entry]:
        return (entry for entry in self._all() if entry.digest == digest)

    def _used_bytes(self) -> int:
        return sum(entry.nbytes for entry in self._all() if entry.has_room)

    def _prefetch(self, digest: str, nbytes: int) -> None:
        weights = self.retain(digest, nbytes)
        weights.add_done_callback(lambda _: self.release(digest, weights))

    def _fill(self, entry: _Entry) -> None:
        """A worker's job: take room, load, publish by one assignment; or tell every waiter why not."""
        try:
            with self._changed:
                self._take_room(entry)
            with self._one_at_a_time:
                weights = self._load(entry.digest)
        except AdapterError as error:
            self._fail(entry, error)
        except Exception as error:  # noqa: BLE001 - the worker's boundary: a waiter must never hang
            self._fail(entry, MemoryFullError(f"the adapter could not be loaded now ({type(error).__name__})"))
        else:
            with self._changed:
                entry.weights.set_result(weights)
                self._settle(entry)

    def _fail(self, entry: _Entry, error: AdapterError) -> None:
        with self._changed:
            # only what is wrong with the files stays wrong; the rest may have passed by the next request
            is_asked_for = self._entries.get(entry.digest) is entry
            if is_asked_for and isinstance(error, InvalidAdapterError | AdapterFailedError):
                self._reasons[entry.digest] = str(error)
            self._forget(entry)
            entry.weights.set_exception(error)

    def _take_room(self, entry: _Entry) -> None:
        """Wait until `entry` fits, in order of arrival: who came later passes only where it delays nobody for long."""
        self.check_size(entry.nbytes)
        entry.waits_since = time.monotonic()
        self._waiting.append(entry)
        try:
            while not self._can_enter(entry):
                if self._is_hopeless(entry):
                    raise MemoryFullError("adapters in use or pinned fill the memory; raise --adapter-memory-bytes")
                self._changed.wait(_PATIENCE_SECONDS / 4)
            entry.has_room = True
        finally:
            self._waiting.remove(entry)
            self._changed.notify_all()

    def _can_enter(self, entry: _Entry) -> bool:
        """Whether there is room for `entry` now, made by evicting what is idle and, for the patient, by retiring."""
        first = self._waiting[0]
        if entry is not first and self._has_waited(first, _PATIENCE_SECONDS):
            return False
        evictable = [other for other in self._entries.values() if other.is_idle and other.digest not in self._pinned]
        if self._used_bytes() - sum(other.nbytes for other in evictable) + entry.nbytes <= self._budget:
            for other in evictable:
                if self._used_bytes() + entry.nbytes > self._budget:
                    self._forget(other)
            return True
        if entry is first and self._has_waited(entry, _PATIENCE_SECONDS):
            self._retire_for(entry)
        return False

    def _retire_for(self, entry: _Entry) -> None:
        """Retire the least recently used until their bytes and what is free will do."""
        loaded = [e for e in self._entries.values() if e.weights.done() and e.digest not in self._pinned]
        for other in loaded:
            staying = sum(e.nbytes for e in self._entries.values() if e.has_room)
            if staying + entry.nbytes > self._budget:
                self._retire(other)

    def _retire(self, entry: _Entry) -> None:
        """Out of reach for new users at once, out of memory when the last one is done."""
        del self._entries[entry.digest]
        self._retired.append(entry)
        self._settle(entry)

    def _settle(self, entry: _Entry) -> None:
        """After a user left or a load ended: free what is retired and idle, and wake who waits for room."""
        if entry in self._retired and entry.is_idle:
            self._retired.remove(entry)
        self._changed.notify_all()

    def _forget(self, entry: _Entry) -> None:
        if entry in self._retired:
            self._retired.remove(entry)
        else:
            del self._entries[entry.digest]
        self._changed.notify_all()

    def _is_hopeless(self, entry: _Entry) -> bool:
        """Whether what is pinned leaves it no room, or it has waited long enough, or nobody will be served any more."""
        pinned = sum(nbytes for digest, nbytes in self._pinned.items() if digest != entry.digest)
        is_too_late = self._is_closed or self._has_waited(entry, _ROOM_TIMEOUT_SECONDS)
        return is_too_late or pinned + entry.nbytes > self._budget

    def _has_waited(self, entry: _Entry, seconds: float) -> bool:
        return time.monotonic() - entry.waits_since > seconds
