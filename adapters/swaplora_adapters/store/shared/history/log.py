"""The log of changes: who makes its next object has made the next change, and nobody makes one twice."""

from collections import defaultdict
from collections.abc import Mapping
from typing import NoReturn

from swaplora_adapters.errors import StoreChangedError, StoreUnreachableError
from swaplora_adapters.store.shared.history.entry import Entry, Position
from swaplora_adapters.store.shared.history.moment import Moment
from swaplora_adapters.store.shared.history.segments import Segments, end_of, segment_of
from swaplora_adapters.store.shared.history.snapshots import Snapshots
from swaplora_adapters.store.shared.identity import is_founded
from swaplora_adapters.store.shared.objects import Objects
from swaplora_adapters.store.shared.trying import decoded, encoded, tried

FOREIGN_SECONDS = 60.0  # that whoever has made a change in a store of another history has to take it back
TRUST_SECONDS = 10.0  # after it was made sure of that all that follows is here to be read; it stays for far longer


class TrimmedError(Exception):
    """What follows is no more in the log: a snapshot has it."""


class Log:
    """The changes of one shared store. Any thread may call; each raises StoreUnreachableError."""

    def __init__(self, objects: Objects, store_id: str) -> None:
        self._objects, self._store_id = objects, store_id
        self._prefix = f"{store_id}/log/"
        self._segments = Segments(objects, store_id)
        self._snapshots = Snapshots(objects, store_id)
        self._foreign: tuple[str | None, Moment] | None = None  # a change of another history, and since when
        self._sure: tuple[int, Moment] | None = None  # that the change after this one was there, or was yet to come

    def read(self, revision: int) -> Entry | None:
        """None if it is not there."""
        content = tried(lambda: self._objects.get(self._key(revision)))
        if content is None:
            return None
        [told] = decoded(content, f"change {revision}")
        return Entry(told["revision"], told["kind"], told["name"], told["facts"], told["id"], told.get("after"))

    def after(self, position: Position, most: int) -> tuple[list[Entry], bool]:
        """Changes that follow, `most` at most, and whether these are all.

        Raises what `check` does, which is asked now and then, since somebody may have slept for hours, and where one
        was made after another than the one before it: in another history, whose store was brought back as it was.
        """
        began, entries, is_all, last = Moment.now(), list[Entry](), False, position
        first = position.revision + 1
        for revision in range(first, min(first + most, end_of(segment_of(first)) + 1)):
            if is_all := (entry := self.read(revision)) is None:
                break
            if not entry.follows(last):
                if not entries:
                    self._refuse(entry, position)
                break
            entries.append(entry)
            last = entry.position
        if not self._is_sure(position.revision, Moment.now()):
            self._sure = None
            self.check(position)  # after all of it was read
            if is_all:
                self._sure = position.revision + len(entries), began
        return entries, is_all

    def _refuse(self, entry: Entry, position: Position) -> NoReturn:
        """Take over nothing that was made after another change than this one, and remove what was made so here.

        It is there between the two calls in which a server learns that the store was brought back; if it was killed
        there, for good.
        """
        self.check(position)
        now = Moment.now()
        if self._foreign is None or self._foreign[0] != entry.id:
            self._foreign = entry.id, now
        elif self._foreign[1].seconds_to(now) > FOREIGN_SECONDS:
            tried(lambda: self._objects.remove(self._key(entry.revision)))
        raise StoreUnreachableError(f"change {entry.revision} of the shared store is being taken back: try again")

    def has_beyond(self, revision: int) -> bool:
        """Whether a change is there that does not follow this one."""
        keys = [each.key for each in tried(lambda: self._objects.under(self._prefix))]
        return any(int(key.removeprefix(self._prefix)) > revision + 1 for key in keys)

    def append(self, entry: Entry, after: Position) -> bool:
        """Make a change the next one, durably; False if another was made in its place.

        After StoreUnreachableError it may still come to be: whoever reads on from there will see. Raises
        StoreChangedError.
        """
        key, content = self._key(entry.revision), encoded(entry._asdict())
        # where it is there already it may be by a try whose answer was lost: the id tells
        if not tried(lambda: self._objects.create(key, content) or self._objects.get(key) == content):
            return False
        try:
            self.check(after)
        except TrimmedError:  # there was nothing in its place because that was removed, unless it was itself
            self._sure = None
            ids = self._segments.ids(entry.revision) or {}
            if ids.get(entry.revision) == entry.id:
                return True
            self._objects.remove(key)
            return False
        except StoreChangedError:
            if tried(lambda: self._objects.get(key)) == content:
                self._objects.remove(key)
            raise
        except BaseException:
            self._sure = None
            raise
        return True

    def check(self, position: Position) -> None:
        """Raise TrimmedError if what follows may have been removed by now.

        And StoreChangedError if this change is not one of the store's.
        """
        ids = self._segments.ids(position.revision + 1)
        if not self._has(position, {} if ids is None else ids):
            self._sure = None
            raise StoreChangedError(
                f"the shared store does not have change {position.revision}, which is known here: was it brought back "
                "from a backup? Start this server with an empty --data-dir, or bring back the store as it was"
            )
        if ids is not None:
            raise TrimmedError

    def trim(self, revision: int) -> int:
        """Remove all whole segments up to this change, of which there must be a snapshot; how many objects.

        Whoever is killed amid it, or does it beside another, leaves to the next what is left of it.
        """
        keys, num_removed = defaultdict[int, list[int]](list), 0
        for each in tried(lambda: self._objects.under(self._prefix)):
            found = int(each.key.removeprefix(self._prefix))
            keys[segment_of(found)].append(found)
        for segment, revisions in sorted(keys.items()):
            if end_of(segment) > revision or not self._mark(revisions, end_of(segment)):
                break  # none is before one that is left
            for removed in revisions:
                self._objects.remove(self._key(removed))
            num_removed += len(revisions)
        return num_removed

    def is_trimmed(self, revision: int) -> bool:
        """Whether this change may have been removed by now."""
        return self._segments.ids(revision) is not None

    def _mark(self, revisions: list[int], end: int) -> bool:
        """Whether it is known now, for good, which changes a segment was of."""
        if self.is_trimmed(end):
            return True
        entries = [self.read(revision) for revision in revisions]
        ids = {entry.revision: entry.id for entry in entries if entry is not None and entry.id is not None}
        if [*ids] != [*range(revisions[0], end + 1)]:
            return False  # another server removes them, or they are not whole
        self._segments.mark(ids)
        return True

    def _has(self, position: Position, ids: Mapping[int, str]) -> bool:
        """Whether it is one of the store's: it lies there, the `ids` of the next one's segment, or its own, tell.

        Or a snapshot was made after it: in a backup it may be all that tells.
        """
        revision, change = position
        if change is None:
            return is_founded(self._objects, self._store_id)
        if ids.get(revision) == change or ((entry := self.read(revision)) is not None and entry.id == change):
            return True
        if (self._segments.ids(revision) or {}).get(revision) == change:
            return True
        newest = self._snapshots.newest()
        return (newest.revision, newest.id) == position

    def _is_sure(self, revision: int, now: Moment) -> bool:
        if (sure := self._sure) is None:
            return False
        since, at = sure
        return revision >= since and at.seconds_to(now) < TRUST_SECONDS

    def _key(self, revision: int) -> str:
        return f"{self._prefix}{revision:020d}"
