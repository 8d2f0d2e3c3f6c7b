"""The log kept short: a snapshot after each segment, and after a while no segment that a snapshot has."""

import time

from swaplora_adapters.store.shared.history.entry import Entry, Position
from swaplora_adapters.store.shared.history.log import Log
from swaplora_adapters.store.shared.history.segments import end_of, segment_of
from swaplora_adapters.store.shared.history.snapshots import Snapshots

GRACE_SECONDS = 3600.0  # in which who is behind reads on in the log; also far longer than it is trusted unseen


class Compaction:
    """One server's part in it. All may do it at once, and be killed at any step. For one thread."""

    def __init__(self, log: Log, snapshots: Snapshots) -> None:
        self._log = log
        self._snapshots = snapshots
        self._snapshot_at = 0  # the newest that is known of
        self._found: tuple[int, float] | None = None  # that there is one, and since when, on the monotonic clock
        self._trimmed_to = 0

    def run(self, revision: int) -> None:
        """What is due when this is the last change that is known. Raises StoreUnreachableError."""
        end = end_of(segment_of(revision + 1) - 1)
        if end > self._snapshot_at:
            self._snapshot_at = self._snapshots.last_revision()  # another server's, as a rule
            if end > self._snapshot_at:
                self._make(end)
        if self._found is None and self._snapshot_at > self._trimmed_to:
            self._found = self._snapshot_at, time.monotonic()
        if self._found is not None and time.monotonic() - self._found[1] > GRACE_SECONDS:
            snapshot_at, self._found = self._found[0], None
            if self._snapshots.last_revision() >= snapshot_at:
                self._log.trim(snapshot_at)
                self._trimmed_to = snapshot_at

    def _make(self, end: int) -> None:
        """A snapshot after the change `end`, of the one before and the log: nothing is held meanwhile."""
        before = self._snapshots.newest()
        entries, last = list[Entry](), Position(before.revision, before.id)
        for revision in range(before.revision + 1, end + 1):
            if (entry := self._log.read(revision)) is None or not entry.follows(last):
                return  # the store is another's history now, or not whole
            entries.append(entry)
            last = entry.position
        if entries and not self._log.is_trimmed(before.revision + 1):  # a newer one is there, and it was removed
            self._snapshots.put(before.replayed(entries))
            self._snapshot_at = end
