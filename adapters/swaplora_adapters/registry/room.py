"""Who has room in memory and who comes next: decisions alone, without threads, files or locks."""

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from swaplora_adapters.artifact.served import AdapterWeights

TIMEOUT_SECONDS = 30.0
PATIENCE_SECONDS = 0.5  # before the one who waits longest comes first, and what is in use has to make room


@dataclass(slots=True, eq=False)
class Entry:
    """One copy of a version: in memory, loading, or waiting for room since `asked_at`."""

    digest: str
    nbytes: int
    asked_at: float
    weights: Future[AdapterWeights] = field(default_factory=Future)
    num_users: int = 0
    has_room: bool = False  # its bytes count against the budget
    heir: "Entry | None" = None  # took over its memory, and counts it as one user

    @property
    def is_idle(self) -> bool:
        return self.weights.done() and not self.num_users


class Room:
    """Owns the budget and the line of who waits for a part of it. Not thread-safe; times are `time.monotonic()`'s.

    When the first in line has waited its patience, the least recently used adapters retire: the requests that run on
    them end on them, new ones stand in line. So no adapter keeps the others out by never being idle. Whoever comes to
    the front while such a copy is still in memory takes it over: nothing is loaded twice because others waited.
    """

    def __init__(self, budget: int) -> None:
        """`budget` is in bytes of weights."""
        self.budget = budget
        self.pinned: dict[str, int] = {}
        self.kept: dict[str, int] = {}  # the pinned ones that are never evicted
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self._retired: list[Entry] = []  # in memory only until their users are done
        self._waiting: deque[Entry] = deque()  # in order of arrival

    @property
    def used_bytes(self) -> int:
        return _total(entry for entry in self.copies() if entry.has_room)

    def copies(self) -> list[Entry]:
        """All, what has retired included."""
        return [*self._entries.values(), *self._retired]

    def find(self, digest: str) -> Entry | None:
        """The one that new users share."""
        return self._entries.get(digest)

    def holder(self, digest: str, weights: Future[AdapterWeights]) -> Entry | None:
        """The one that `weights` belong to, if it is still here."""
        entry = self.find(digest)
        if entry is not None and entry.weights is weights:
            return entry
        return next((entry for entry in self._retired if entry.weights is weights), None)

    def is_draining(self, digest: str) -> bool:
        return any(entry.digest == digest for entry in self._retired)

    def add(self, entry: Entry) -> None:
        """Let it stand in line."""
        self._entries[entry.digest] = entry
        self._waiting.append(entry)

    def touch(self, digest: str) -> None:
        """Note a use."""
        self._entries.move_to_end(digest)

    def pin(self, pinned: Mapping[str, int]) -> None:
        """Keep exactly these, digest → bytes, or as many as leave room for any single one of the others."""
        self.pinned = dict(pinned)
        fitting = {digest: nbytes for digest, nbytes in pinned.items() if nbytes <= self.budget}
        self.kept = fitting
        if sum(fitting.values()) > self.budget:
            self.kept = _first_that_fit(fitting, self.budget - max(fitting.values()))

    def next_in(self, now: float) -> Entry | None:
        """Take who comes next out of the line, with room made for it, or with weights where a copy was still there.

        Who came later passes the first one only while that one has patience. None if nobody can come in now.
        """
        if not self._waiting:
            return None
        first = self._waiting[0]
        is_patient = now - first.asked_at < PATIENCE_SECONDS
        idle = [entry for entry in self._entries.values() if entry.is_idle and entry.digest not in self.kept]
        free = self.budget - self.used_bytes + _total(idle)
        for entry in self._waiting if is_patient else [first]:
            copy = self._retired_copy(entry.digest)
            if copy is not None or entry.nbytes <= free:
                self._enter(entry, copy, idle)
                return entry
        if not is_patient:
            self._retire_for(first)
        return None

    def next_hopeless(self, now: float) -> Entry | None:
        """One who has waited too long, or to whom what is kept leaves no room."""
        return next((entry for entry in self._waiting if self._is_hopeless(entry, now)), None)

    def seconds_to_wait(self, now: float) -> float | None:
        """Until time alone changes something: the patience of the first in line ends, or its hope. None for never."""
        if not self._waiting:
            return None
        waited = now - self._waiting[0].asked_at
        return min(limit - waited for limit in (PATIENCE_SECONDS, TIMEOUT_SECONDS) if limit > waited)

    def retire(self, entry: Entry) -> None:
        """Out of reach for new users at once, out of memory when the last one is done."""
        del self._entries[entry.digest]
        self._retired.append(entry)
        self.settle(entry)

    def settle(self, entry: Entry) -> None:
        """After a user left or a load ended: free what is retired and idle, and let nobody wait for no user."""
        if not entry.num_users and entry in self._waiting:
            self.forget(entry)
        elif entry.is_idle and entry in self._retired:
            self._retired.remove(entry)
            if entry.heir is not None:
                entry.heir.num_users -= 1
                self.settle(entry.heir)

    def forget(self, entry: Entry) -> None:
        """Free it, or take it out of the line."""
        if entry in self._waiting:
            self._waiting.remove(entry)
        if entry in self._retired:
            self._retired.remove(entry)
        else:
            del self._entries[entry.digest]

    def check_integrity(self) -> None:
        """Raise RuntimeError if a count went below zero, the budget is exceeded, or what retired stays for nobody."""
        if any(entry.num_users < 0 for entry in self.copies()):
            raise RuntimeError("an adapter was released more often than retained")
        if self.used_bytes > self.budget:
            raise RuntimeError("resident adapters exceed their budget")
        if any(entry.is_idle for entry in self._retired):
            raise RuntimeError("a retired adapter is still in memory, and nobody uses it")
        if any(entry.has_room or not entry.num_users for entry in self._waiting):
            raise RuntimeError("an adapter waits for room that has it, or that nobody wants")

    def _enter(self, entry: Entry, copy: Entry | None, idle: Iterable[Entry]) -> None:
        """Give it the memory of `copy`, or room for its own, and evict the first of `idle` until the budget is kept."""
        self._waiting.remove(entry)
        entry.has_room = True
        if copy is not None:
            _take_over(entry, copy)
            return
        excess = self.used_bytes - self.budget
        for other in idle:
            if excess > 0:
                self.forget(other)
                excess -= other.nbytes

    def _retire_for(self, entry: Entry) -> None:
        """Retire the least recently used until their bytes and what is free will do."""
        loaded = [other for other in self._entries.values() if other.weights.done() and other.digest not in self.kept]
        staying = _total(other for other in self._entries.values() if other.has_room)
        for other in loaded:
            if staying + entry.nbytes > self.budget:
                staying -= other.nbytes
                self.retire(other)

    def _retired_copy(self, digest: str) -> Entry | None:
        loaded = (entry for entry in self._retired if entry.has_room and entry.weights.done())
        return next((entry for entry in loaded if entry.digest == digest), None)

    def _is_hopeless(self, entry: Entry, now: float) -> bool:
        kept = sum(nbytes for digest, nbytes in self.kept.items() if digest != entry.digest)
        return now - entry.asked_at >= TIMEOUT_SECONDS or kept + entry.nbytes > self.budget


def _take_over(heir: Entry, copy: Entry) -> None:
    copy.has_room = False
    copy.heir = heir
    heir.num_users += 1
    heir.weights.set_result(copy.weights.result())


def _first_that_fit(sizes: Mapping[str, int], room: int) -> dict[str, int]:
    fitting: dict[str, int] = {}
    for digest, nbytes in sizes.items():
        if sum(fitting.values()) + nbytes <= room:
            fitting[digest] = nbytes
    return fitting


def _total(entries: Iterable[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)
