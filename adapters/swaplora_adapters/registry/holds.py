"""Who holds what: leases counted by name and by digest, and versions on their way out once nobody holds them."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from swaplora_adapters.registry.leases import Removal
from swaplora_adapters.store.records import VersionRecord


class Holds:
    """Owns the counts and the removals that wait for them. `lock` is never held across anything slow."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._by_name: Counter[str] = Counter()
        self._by_digest: Counter[str] = Counter()
        self._last_used: dict[str, float] = {}
        self._removals: list[Removal] = []

    def take(self, record: VersionRecord) -> None:
        """Count one lease more. Needs `lock`."""
        self._by_name[record.name] += 1
        self._by_digest[record.digest] += 1
        self._last_used[record.name] = time.time()

    def give_back(self, record: VersionRecord) -> bool:
        """Count one lease less; whether a removal may have waited for it. Needs `lock`."""
        _count_down(self._by_name, record.name)
        _count_down(self._by_digest, record.digest)
        return any(record.digest in removal.digests for removal in self._removals)

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


def _count_down(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
