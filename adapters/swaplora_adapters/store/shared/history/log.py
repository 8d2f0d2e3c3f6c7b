"""The log of changes: who makes its next object has made the next change, and nobody makes one twice."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress

from swaplora_adapters.errors import StoreChangedError, StoreUnreachableError
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.store.shared.history.entry import Entry, Position
from swaplora_adapters.store.shared.history.moment import Moment
from swaplora_adapters.store.shared.history.segments import Segments, end_of, segment_of
from swaplora_adapters.store.shared.identity import is_founded
from swaplora_adapters.store.shared.objects import Objects
from swaplora_adapters.store.shared.trying import decoded, encoded, tried

TRUST_SECONDS = 10.0  # after it was made sure of that all that follows is here to be read; it stays for far longer


class TrimmedError(Exception):
    """What follows is no more in the log: a snapshot has it."""


class Log:
    """The changes of one shared store. Any thread may call; each raises StoreUnreachableError."""

    def __init__(self, objects: Objects, store_id: str) -> None:
        self._objects, self._store_id = objects, store_id
        self._prefix = f"{store_id}/log/"
        self._segments = Segments(objects, store_id)
        self._sure: tuple[int, Moment] | None = None  # that the change after this one was there, or was yet to come

    def read(self, revision: int) -> Entry | None:
        """None if it is not there."""
        content = tried(lambda: self._objects.get(self._key(revision)))
        return None if content is None else _read(content, revision)

    def after(self, position: Position, most: int) -> tuple[list[Entry], bool]:
        """Changes that follow, `most` at most, and whether these are all.

        Raises what `check` does, which is asked now and then: somebody may have slept for hours.
        """
        began, entries, is_all = Moment.now(), list[Entry](), False
        first, last = position.revision + 1, position
        for revision in range(first, min(first + most, end_of(segment_of(first)) + 1)):
            entry = self.read(revision)
            if entry is None or not self.is_next(entry, last):
                is_all = True
                break
            entries.append(entry)
            last = entry.position
        if not self._is_sure(position.revision, Moment.now()):
            self._sure = None
            self.check(position)  # after all of it was read
            if is_all:
                self._sure = position.revision + len(entries), began
        return entries, is_all

    def is_next(self, entry: Entry, position: Position) -> bool:
        """Whether what was read is to be taken over after this change: it may be of another history.

        Such a one stands there while a server makes and takes back what follows nothing, or for good if that is killed.
        Only who made it removes it: of two that did, one could remove what was made in its place. Raises what `check`
        does.
        """
        if entry.follows(position):
            return True
        self.check(position)
        return entry.after is None  # an earlier release's, which does not say what it follows

    def append(self, entry: Entry) -> bool:
        """Make a change the next one, durably; False if another was made in its place.

        After StoreUnreachableError it may still come to be: whoever reads on from there will see. Raises
        StoreChangedError.
        """
        key, content = self._key(entry.revision), encoded(entry._asdict())
        # where it is there already it may be by a try whose answer was lost: the id tells
        made = tried(lambda: content if self._objects.create(key, content) else self._objects.get(key))
        if made != content:
            with suppress(TrimmedError):
                if made is not None and not self.is_next(found := _read(made, entry.revision), entry.before):
                    raise StoreUnreachableError(
                        f"{key} in the shared store is a change of another history: it follows change {found.after}, "
                        f"and the one before it is {entry.after}. Perhaps a server of a store that was brought back "
                        "was killed as it made it. If it stays, stop all servers, and remove that object"
                    )
            return False
        try:
            self.check(entry.before)
        except TrimmedError:  # there was nothing in its place because that was removed, unless it was itself
            self._sure = None
            ids = self._segments.ids(entry.revision) or {}
            if ids.get(entry.revision) == entry.id:
                return True
            self._objects.remove(key)
            return False
        except StoreChangedError:
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
        for found in self.revisions():
            keys[segment_of(found)].append(found)
        for segment, revisions in sorted(keys.items()):
            if end_of(segment) > revision or not self._mark(segment):
                break  # none is before one that is left
            for removed in revisions:
                self._objects.remove(self._key(removed))
            num_removed += len(revisions)
        return num_removed

    def revisions(self) -> list[int]:
        """Of what is there now, in order."""
        return [int(each.key.removeprefix(self._prefix)) for each in tried(lambda: self._objects.under(self._prefix))]

    def is_trimmed(self, revision: int) -> bool:
        """Whether this change may have been removed by now."""
        return self._segments.ids(revision) is not None

    def note_trimmed(self, position: Position) -> None:
        """That this change was the last of its segment, all of which was removed."""
        assert position.id is not None
        self._segments.mark({position.revision: position.id})

    def _mark(self, segment: int) -> bool:
        """Whether it is known now, for good, which changes a segment was of: all that are there, listed or not."""
        first, end = end_of(segment - 1) + 1, end_of(segment)
        if self.is_trimmed(end):
            return True
        entries = [self.read(revision) for revision in range(first, end + 1)]
        ids = {entry.revision: entry.id for entry in entries if entry is not None and entry.id is not None}
        if not ids or [*ids] != [*range(min(ids), end + 1)]:
            return False  # another server removes them, or they are not whole
        self._segments.mark(ids)
        return True

    def _has(self, position: Position, ids: Mapping[int, str]) -> bool:
        """Whether it is one of the store's: it lies there, or the `ids` of the next one's segment, or its own, tell."""
        revision, change = position
        if change is None:
            return is_founded(self._objects, self._store_id)
        if ids.get(revision) == change or ((entry := self.read(revision)) is not None and entry.id == change):
            return True
        return (self._segments.ids(revision) or {}).get(revision) == change

    def _is_sure(self, revision: int, now: Moment) -> bool:
        if (sure := self._sure) is None:
            return False
        since, at = sure
        return revision >= since and at.seconds_to(now) < TRUST_SECONDS

    def _key(self, revision: int) -> str:
        return f"{self._prefix}{revision:020d}"


def _read(content: bytes, revision: int) -> Entry:
    """Raises DamagedError, and StoreChangedError for another release's, of which nothing is known here."""
    try:
        [told] = decoded(content, f"change {revision}")
    except StoreError as error:
        raise StoreChangedError(str(error)) from None
    return Entry(told["revision"], told["kind"], told["name"], told["facts"], told["id"], told.get("after"))
