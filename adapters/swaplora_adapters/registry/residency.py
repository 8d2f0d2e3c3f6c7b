"""Which versions are in memory: a byte budget, least recently used first out, what is in use never.

Versions are known by digest alone, so two names with the same bytes share one copy. Loads run in a worker thread, one
per digest however many wait for it.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
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


@dataclass(slots=True)
class _Entry:
    nbytes: int
    weights: Future[AdapterWeights] = field(default_factory=Future)
    num_users: int = 0


class Residency:
    """Owns the memory of adapters. Thread-safe; `retain` and `release` pair up, and `drop` forgets for good."""

    def __init__(self, load: Callable[[str], AdapterWeights], budget: int) -> None:
        """`load` reads one digest's weights into memory; `budget` is in bytes of weights."""
        self._load = load
        self._budget = budget
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._reasons: dict[str, str] = {}
        self._changed = threading.Condition()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-load")

    @property
    def resident_bytes(self) -> int:
        with self._changed:
            return self._resident_bytes()

    def check_size(self, nbytes: int) -> None:
        """Raise AdapterTooLargeError for what could never be loaded."""
        if nbytes > self._budget:
            raise AdapterTooLargeError(
                f"the adapter needs {nbytes} bytes of memory, and the server gives all of its adapters {self._budget}"
            )

    def state(self, digest: str) -> tuple[str, str | None]:
        """stored, loading, resident or failed, and why it failed."""
        with self._changed:
            entry = self._entries.get(digest)
            if entry is None:
                reason = self._reasons.get(digest)
                return ("failed", reason) if reason else ("stored", None)
            return ("resident" if entry.weights.done() else "loading"), None

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
                entry = _Entry(nbytes)
                if digest in self._reasons:
                    entry.weights.set_exception(AdapterFailedError(self._reasons[digest]))
                    return entry.weights
                self._entries[digest] = entry
                self._worker.submit(self._fill, digest, entry)
            self._entries.move_to_end(digest)
            entry.num_users += 1
            return entry.weights

    def release(self, digest: str, weights: Future[AdapterWeights]) -> None:
        """Count one user less; `weights` is what `retain` gave it."""
        with self._changed:
            entry = self._entries.get(digest)
            if entry is not None and entry.weights is weights:
                entry.num_users -= 1
                self._changed.notify_all()

    def drop(self, digest: str) -> None:
        """Forget a version that nobody uses or will ask for again, its failure included."""
        with self._changed:
            self._reasons.pop(digest, None)
            entry = self._entries.get(digest)
            if entry is not None and not entry.num_users:
                del self._entries[digest]
                self._changed.notify_all()

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def check_integrity(self) -> None:
        """Raise RuntimeError if a count went below zero or the budget is exceeded."""
        with self._changed:
            if any(entry.num_users < 0 for entry in self._entries.values()):
                raise RuntimeError("an adapter was released more often than retained")
            if self._resident_bytes() > self._budget:
                raise RuntimeError("resident adapters exceed their budget")

    def _resident_bytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values() if entry.weights.done())

    def _fill(self, digest: str, entry: _Entry) -> None:
        """The worker's job: make room, load, publish by one assignment; or tell every waiter why not."""
        try:
            with self._changed:
                self._make_room(entry.nbytes)
            weights = self._load(digest)
        except AdapterError as error:
            self._fail(digest, entry, error)
        except Exception as error:  # noqa: BLE001 - the worker's boundary: a waiter must never hang
            self._fail(digest, entry, MemoryFullError(f"the adapter could not be loaded now ({type(error).__name__})"))
        else:
            with self._changed:
                self._reasons.pop(digest, None)
                entry.weights.set_result(weights)

    def _fail(self, digest: str, entry: _Entry, error: AdapterError) -> None:
        with self._changed:
            # only what is wrong with the files stays wrong; the rest may have passed by the next request
            if isinstance(error, InvalidAdapterError | AdapterFailedError):
                self._reasons[digest] = str(error)
            del self._entries[digest]
            entry.weights.set_exception(error)
            self._changed.notify_all()

    def _make_room(self, nbytes: int) -> None:
        """Evict the least recently used until `nbytes` fit; wait for users to finish where all are in use."""
        self.check_size(nbytes)
        deadline = time.monotonic() + _ROOM_TIMEOUT_SECONDS
        while self._resident_bytes() + nbytes > self._budget:
            idle = next((d for d, entry in self._entries.items() if entry.weights.done() and not entry.num_users), None)
            if idle is not None:
                del self._entries[idle]
            elif not self._changed.wait(deadline - time.monotonic()):
                raise MemoryFullError("every resident adapter is in use; try again, or raise --adapter-memory-bytes")
