"""The log kept short: a snapshot after each segment, and after a while no segment that the last two of them have."""

import time
from collections.abc import Sequence
from contextlib import suppress

from swaplora_adapters.errors import StoreUnreachableError
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

        Raises StoreUnreachableError, also where a snapshot was found to be unfit once that was made good.
        """
        end, complaints = end_of(segment_of(revision + 1) - 1), list[str]()
        if end > self._snapshot_at:
            self._snapshot_at = self._snapshots.last().revision  # another server's, as a rule
            if end > self._snapshot_at:
                complaints += self._make(end)
        if self._found is None and self._snapshot_at > self._trimmed_to:
            self._found = self._snapshot_at, time.monotonic()
        if self._found is not None and time.monotonic() - self._found[1] > GRACE_SECONDS:
            snapshot_at, self._found = self._found[0], None
            chosen = self._snapshots.choose(2)  # read, since for what is removed there is nothing else
            newest, before = chosen.snapshots
            if newest.revision >= snapshot_at:
                self._log.trim(min(before.revision, snapshot_at))
                self._trimmed_to = snapshot_at
            else:
                self._make(end)
            complaints += chosen.complaints
        if complaints:
            raise StoreUnreachableError(f"{'; '.join(complaints)}: the one before it and the log took its place")

    def _make(self, end: int) -> Sequence[str]:
        """A snapshot after the change `end`, of the one before and the log: nothing is held meanwhile.

        What is wrong with those that it could not be made of.
        """
        chosen = self._snapshots.choose()
        before = chosen.newest
        entries, last = list[Entry](), before.position
        with suppress(TrimmedError):  # a newer one is there
            for revision in range(before.revision + 1, end + 1):
                entry = self._log.read(revision)
                if entry is None or not self._log.is_next(entry, last):
                    return chosen.complaints
                entries.append(entry)
                last = entry.position
            if entries and not self._log.is_trimmed(before.revision + 1):  # a newer one is there, and it was removed
                self._log.check(last)
                self._snapshots.put(before.replayed(entries), before)
                self._snapshot_at = end
        return chosen.complaints
