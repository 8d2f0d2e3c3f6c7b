"""A request's hold on a version, the counts of such holds, and a version's way out once nobody holds it."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

from swaplora_adapters.registry.residency.claims import Claim
from swaplora_adapters.store.records import VersionRecord
from swaplora_adapters.weights.served import AdapterWeights

Key = TypeVar("Key", str, tuple[str, int])


class Lease:
    """One request's hold on one version, from admission to its end: files and identity. Give it back exactly once.

    `stored` is the record as the registry has it, where the request's tenant knows it by another name.
    """

    def __init__(
        self, record: VersionRecord, give_back: Callable[["Lease"], None], stored: VersionRecord | None = None
    ) -> None:
        self.record = record
        self.stored = stored or record
        self._give_back = give_back
        self._is_released = False

    def release(self) -> None:
        """Raises RuntimeError the second time: a count that is off would free weights under somebody."""
        if self._is_released:
            raise RuntimeError("a lease was given back twice")
        self._is_released = True
        self._give_back(self)


class RequestLeases:
    """What one request holds: its leases, and memory for the weights of all of them at once, or none yet."""

    def __init__(self, leases: Sequence[Lease], claim: Claim, free: Callable[[Claim], None]) -> None:
        self.leases = tuple(leases)
        self._claim = claim
        self._free = free

    @property
    def weights(self) -> Future[Mapping[str, AdapterWeights]]:
        """By digest, when all are in memory; fails with the reason when one cannot be."""
        return self._claim.weights

    @property
    def at_fault(self) -> Lease | None:
        """The one that `weights` failed for, if it was a single one."""
        return next((lease for lease in self.leases if lease.record.digest == self._claim.at_fault), None)

    def lacks_room(self) -> bool:
        """Whether it waits for memory that others have. Any thread may ask."""
        return not self._claim.weights.done() and not self._claim.residents

    def release(self) -> None:
        """Give back everything, memory first. Raises RuntimeError the second time."""
        self._free(self._claim)
        for lease in self.leases:
            lease.release()


class Removal:
    """Versions on their way out: gone for new requests, in memory until the last lease on them is back."""

    def __init__(self, records: Sequence[VersionRecord]) -> None:
        self.records = tuple(records)
        self.digests = {record.digest for record in records}
        self.freed: Future[None] = Future()  # done when memory and files are free, or belong to another name as well


class LeaseCounts:
    """Owns the counts and the removals that wait for them. `lock` is never held across anything slow."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._by_name: Counter[str] = Counter()
        self._by_digest: Counter[str] = Counter()
        self._last_used: dict[str, float] = {}
        self.used: dict[str, float] = {}  # digest → when it was last leased, in seconds since the epoch
        self._removals: list[Removal] = []
        self._kept: Counter[tuple[str, int]] = Counter()

    def keep(self, record: VersionRecord) -> Lease:
        """A version that is not to go by being outdated, until this is given back."""
        with self.lock:
            self._kept[record.name, record.version] += 1
        return Lease(record, self._let_go)

    def is_kept(self, record: VersionRecord) -> bool:
        return (record.name, record.version) in self._kept

    def _let_go(self, kept: Lease) -> None:
        with self.lock:
            _count_down(self._kept, (kept.record.name, kept.record.version))

    def take(self, record: VersionRecord) -> None:
        """Count one lease more. Needs `lock`."""
        self._by_name[record.name] += 1
        self._by_digest[record.digest] += 1
        self._last_used[record.name] = self.used[record.digest] = time.time()

    def give_back(self, record: VersionRecord) -> bool:
        """Count one lease less; whether a removal may have waited for it. Needs `lock`."""
        _count_down(self._by_name, record.name)
        _count_down(self._by_digest, record.digest)
        return any(record.digest in removal.digests for removal in self._removals)

    def digests(self) -> set[str]:
        """Of all that is leased. Needs `lock`."""
        return set(self._by_digest)

    def num_in_flight(self, name: str) -> int:
        return self._by_name[name]

    def last_used(self, name: str) -> float | None:
        """Seconds since the epoch."""
        return self._last_used.get(name)

    def forget(self, name: str) -> None:
        """Of a name that is no more."""
        self._last_used.pop(name, None)

    def add(self, records: Sequence[VersionRecord]) -> Removal:
        """Versions that have lost their name."""
        removal = Removal(records)
        with self.lock:
            self._removals.append(removal)
        return removal

    def removable(self, elsewhere: Iterable[str]) -> set[str]:
        """Digests to be removed that nobody holds and that are not in use `elsewhere`."""
        with self.lock:
            removed = {digest for removal in self._removals for digest in removal.digests}
            return {digest for digest in removed.difference(elsewhere) if not self._by_digest[digest]}

    def settle(self, gone: frozenset[str] | set[str]) -> None:
        """Tell who waits for removals all of whose digests are `gone`, or in use under another name."""
        with self.lock:
            waiting, self._removals = self._removals, []
            for removal in waiting:
                for digest in removal.digests & gone:
                    self.used.pop(digest, None)
                removal.digests -= gone
                if removal.digests:
                    self._removals.append(removal)
        for removal in waiting:
            if not removal.digests:
                removal.freed.set_result(None)

    def check_integrity(self) -> None:
        """Raise RuntimeError if the two counts differ, or if with no lease out something still waits to be freed."""
        with self.lock:
            if self._by_name.total() != self._by_digest.total():
                raise RuntimeError("leases by name and by digest differ")
            if not self._by_digest and self._removals:
                raise RuntimeError("no lease is out, and a removal still waits")


def _count_down(counter: Counter[Key], key: Key) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
