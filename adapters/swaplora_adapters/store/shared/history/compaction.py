"""The log kept short: a snapshot after each segment, and after a while no segment that a snapshot has."""

import time
from contextlib import suppress

from swaplora_adapters.store.shared.history.entry import Entry
from swaplora_adapters.store.shared.history.log import Log, TrimmedError
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
        """What is due when this is the last change that is known.

        Raises StoreUnreachableError, and StoreChangedError where log and snapshot are not of one history.
        """
        end = end_of(segment_of(revision + 1) - 1)
        if end > self._snapshot_at:
            self._snapshot_at = self._snapshots.last_revision()  # another server's, as a rule
            if end > self._snapshot_at:
                self._make(end)
        if self._found is None and self._snapshot_at > self._trimmed_to:
            self._found = self._snapshot_at, time.monotonic()
        if self._found is not None and time.monotonic() - self._found[1] > GRACE_SECONDS:
            snapshot_at, self._found = self._found[0], None
            snapshot = self._snapshots.newest()  # read, since for what is removed there is nothing else
            if snapshot.revision >= snapshot_at:
                with suppress(TrimmedError):
                    self._log.check(snapshot.position)
                self._log.trim(snapshot_at)
                self._trimmed_to = snapshot_at

    def _make(self, end: int) -> None:
        """A snapshot after the change `end`, of the one before and the log: nothing is held meanwhile."""
        before = self._snapshots.newest()
        entries, last = list[Entry](), before.position
        with suppress(TrimmedError):  # a newer one is there
            for revision in range(before.revision + 1, end + 1):
                entry = self._log.read(revision)
                if entry is None or not self._log.is_next(entry, last):
                    return
                entries.append(entry)
                last = entry.position
            if entries and not self._log.is_trimmed(before.revision + 1):  # a newer one is there, and it was removed
                self._log.check(last)
                self._snapshots.put(before.replayed(entries))
                self._snapshot_at = end
