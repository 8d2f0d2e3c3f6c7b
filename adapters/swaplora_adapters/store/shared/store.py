"""The store of a server that shares its names with others: a copy of what all of them have, and the way to change it.

The data directory is as ever, with `shared` beside it, which says what it is a copy of. Files of adapters are fetched
when they are first wanted, so that those which are not here are not missing.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from swaplora_adapters.errors import (
    AdapterFailedError,
    StoppingError,
    StorageFailedError,
    StorageFullError,
    StoreChangedError,
    StoreUnreachableError,
)
from swaplora_adapters.files.disk import StoreError, regular_size
from swaplora_adapters.store.conditions import UNCONDITIONAL, Conditions
from swaplora_adapters.store.data_dir import DataDir
from swaplora_adapters.store.journal import NotSentError
from swaplora_adapters.store.records import Details, Published, Quarantined, Touched
from swaplora_adapters.store.recovery import Recovery
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.base import Base
from swaplora_adapters.store.shared.extras import Extras
from swaplora_adapters.store.shared.files import SWEPT_AFTER, SharedFiles
from swaplora_adapters.store.shared.heard import HeardObjects
from swaplora_adapters.store.shared.history.compaction import Compaction
from swaplora_adapters.store.shared.history.entry import CHANGE, Entry, Position
from swaplora_adapters.store.shared.history.log import Log, TrimmedError
from swaplora_adapters.store.shared.history.moment import Moment
from swaplora_adapters.store.shared.history.restored import take_stock
from swaplora_adapters.store.shared.history.snapshots import Snapshot, Snapshots
from swaplora_adapters.store.shared.identity import found_or_join, founded_at, is_copy_of_one
from swaplora_adapters.store.shared.journal import SharedJournal
from swaplora_adapters.store.shared.objects import Objects
from swaplora_adapters.store.staging import Staging
from swaplora_adapters.store.store import Store

SWEEP_SECONDS = 3600.0
CLOSE_SECONDS = 2.0  # that an end waits for a change that is being made
_AT_ONCE = 64  # changes that are taken over together


class _Sent(NamedTuple):
    place: str
    at: Moment  # when its first byte went


def open_store(data_dir: Path, address: str | None, base: Base) -> Store:
    """A data directory of one's own, or one that is a copy of the shared store at `address`, which is for one `base`.

    Raises StoreError, and StoreUnreachableError.
    """
    return Store(data_dir) if address is None else SharedStore(data_dir, open_objects(address), base)


class SharedStore(Store):
    """One server's. Any thread may call any method.

    Files that were found damaged here are fetched again: no version is marked as unusable.
    """

    _journal: SharedJournal

    def __init__(self, data_dir: Path, objects: Objects, base: Base) -> None:
        """Raises StoreError, also where directory or base are not this store's, and StoreUnreachableError."""
        self._objects, self._base = objects, base
        self._heard, self._heard_large = HeardObjects(objects), HeardObjects(objects, are_large=True)
        self._heard_files = HeardObjects(objects)  # that a call of these waits says nothing of the store
        self._sent: WeakKeyDictionary[Staging, _Sent] = WeakKeyDictionary()
        self._mended: WeakKeyDictionary[Staging, str] = WeakKeyDictionary()  # the place that its files were sent to
        self._files_here = threading.Lock()  # held while files are moved in or out
        self._fetching = threading.Lock()
        self._fresh: set[str] = set()  # fetched, and not hashed yet
        self._is_closed = False
        self._sweep_at = time.monotonic() + SWEEP_SECONDS
        super().__init__(data_dir)

    def _open(self, folders: DataDir, recovery: Recovery) -> SharedJournal:
        is_copy = is_copy_of_one(folders.shared)
        self._noted = folders.unreferenced
        revision = recovery.agree(self._catalogue, is_copy=is_copy)
        recovery.sweep(self._catalogue, is_copy=is_copy)
        is_filled = bool(self._catalogue.revisions() or self._catalogue.alias_revisions())

        known = max(revision, 1) if is_filled else 0  # earlier releases count none

        def publish(store_id: str) -> None:
            self._send_all(SharedFiles(self._objects, store_id))
            Snapshots(self._objects, store_id, Log(self._objects, store_id)).put(self._founding(known))

        mark = found_or_join(self._objects, folders.shared, self._base, known, publish)
        store_id = mark.store_id
        self._log, self._files = Log(self._heard, store_id), SharedFiles(self._heard_files, store_id)
        self._snapshots = Snapshots(self._heard_large, store_id, self._log)
        self._compaction = Compaction(self._log, self._snapshots)
        self.extras = Extras(self._heard, store_id, mark.server_id)
        position = Position(*(self._catalogue.position() or (0, None)))
        opened = SharedJournal(self._catalogue, self._names, self._aliases, self._blobs, position, self._log)
        recovery.notes += self._begin(opened, Position(revision, recovery.told_at(revision, CHANGE)))
        self._places = self._catalogue.places()
        return opened

    def _begin(self, journal: SharedJournal, newest: Position) -> list[str]:
        """Take over what was changed before this server began, or while it was away; what is wrong with snapshots.

        `newest` is the last change that is known here of anything: some before it may not be, after a crash.
        """
        take_stock(self._log, self._snapshots, journal.revision)
        for known in (newest, journal.position):
            with suppress(TrimmedError):
                self._check(known)
        last, complaints = self._snapshots.last().revision, list[str]()
        if last > journal.revision:
            snapshot, complaints = (chosen := self._snapshots.choose()).newest, [*chosen.complaints]
            if snapshot.revision > journal.revision:
                journal.adopt(self._since(snapshot, journal.revision))
        if journal.revision < founded_at(self._objects):
            raise _lost(complaints)
        is_all = False
        while not is_all:
            try:
                entries, is_all = self._after(journal.position)
            except StoreChangedError as error:
                raise StoreError(str(error)) from error
            if entries:
                journal.adopt(entries)
        if (
            journal.revision < last
        ):  # else those that were passed over are of another history, or all of them is in the log
            told = "; ".join(complaints)
            raise StoreError(f"{told}; the log ends before its change {last}: bring back both from one backup")
        return [f"{complaint}: the one before it and the log took its place" for complaint in complaints]

    def _check(self, known: Position) -> None:
        try:
            self._log.check(known)
        except StoreChangedError as error:
            raise StoreError(
                "the data directory has changes that the shared store does not have, which was perhaps restored from a "
                "backup: choose an empty --data-dir"
            ) from error

    def _founding(self, revision: int) -> Snapshot:
        """All that there is in a directory before there is a shared store."""
        catalogue = self._catalogue
        names = {name: catalogue.manifest_of_name(name) for name in catalogue.revisions()}
        aliases = {alias: catalogue.manifest_of_alias(alias) for alias in catalogue.alias_revisions()}
        return Snapshot(revision, None, names, aliases)

    def _send_all(self, files: SharedFiles) -> None:
        """What the directory held before there was a shared store.

        What an earlier start has sent stays where it is: a snapshot of that start may say so.
        """
        sent = files.sent(self._catalogue.places())
        for digest, config_bytes, weights_bytes, failure in self._catalogue.blobs():
            if reason := failure or self._blobs.size_complaint(digest, (config_bytes, weights_bytes)):
                raise StoreError(f"the shared store cannot be made of this data directory: {digest}: {reason}")
            if digest in sent:
                continue
            place = files.send(digest, *self._blobs.paths(digest))
            with self._catalogue.transaction():
                self._catalogue.put_blob(digest, config_bytes, weights_bytes, place)
        self._names.put_all({name: self._catalogue.manifest_of_name(name) for name in self._catalogue.revisions()})

    @property
    def is_shared(self) -> bool:
        return True

    @property
    def asked_at(self) -> float | None:
        asked_at = (self._heard.asked_at, self._heard_large.asked_at)
        return min((at for at in asked_at if at is not None), default=None)

    @property
    def is_awaited(self) -> bool:
        return any(each.is_awaited for each in (self._heard, self._heard_large, self._heard_files))

    @property
    def heard_at(self) -> float:
        return max(self._heard.heard_at, self._heard_large.heard_at)

    def unread(self, revision: int) -> tuple[Sequence[Entry], bool]:
        """Raises StoreChangedError as well."""
        known = self._journal.position
        if known.revision == revision:
            return self._after(known)
        unread = self._after(Position(revision, None))
        with suppress(TrimmedError):
            self._log.check(known)  # what has no id is compared with nothing
        return unread

    def _after(self, position: Position) -> tuple[Sequence[Entry], bool]:
        try:
            return self._log.after(position, _AT_ONCE)
        except TrimmedError:
            return self._leap(position.revision), False

    def _leap(self, revision: int) -> Sequence[Entry]:
        """What the newest snapshot has beyond this change, as changes."""
        snapshot, complaints = (chosen := self._snapshots.choose()).newest, chosen.complaints
        if snapshot.revision <= revision:
            raise _lost(complaints)
        return self._since(snapshot, revision)

    def _since(self, snapshot: Snapshot, revision: int) -> Sequence[Entry]:
        with self._mutex:
            aliases = [*self._catalogue.alias_revisions()]
        return snapshot.since(revision, aliases)

    def catch_up(self, entries: Sequence[Entry]) -> Touched:
        with self._mutex:
            if self._is_closed:
                raise StoppingError
            if new := [entry for entry in entries if entry.revision > self.revision]:
                if new[0].after is not None and not new[0].follows(self._journal.position):
                    raise StoreUnreachableError("the shared store was changed otherwise meanwhile; try again")
                self._journal.adopt(new)
            for digest in {version["digest"] for entry in entries for version in entry.facts.get("versions", ())}:
                self._places |= self._catalogue.places(digest)  # of the last change, which none of these may be
        names, aliases = (frozenset(e.name for e in entries if e.kind == kind) for kind in ("name", "alias"))
        return Touched(names, aliases)

    def close(self) -> None:
        """The process's end lets go of a directory where somebody yet waits for the shared store."""
        self._is_closed = True
        if self._mutex.acquire(timeout=CLOSE_SECONDS):
            try:
                super().close()
            finally:
                self._mutex.release()

    def publish(
        self,
        name: str,
        staging: Staging,
        details: Details,
        *,
        source: str = "upload",
        conditions: Conditions = UNCONDITIONAL,
        origin: str | None = None,
    ) -> Published:
        with self._mutex:
            published = super().publish(name, staging, details, source=source, conditions=conditions, origin=origin)
            self._places |= self._catalogue.places(details.digest)
        if staging in self._mended:
            self._files.forget_damage(details.digest, self._mended[staging])
        with self._files_here, suppress(StorageFullError, StorageFailedError):  # or it is fetched when it is wanted
            if not self.is_here(details.digest):
                self._blobs.place(staging, details.digest)
        return published

    def send(self, staging: Staging, digest: str) -> None:
        began = Moment.now()
        self._blobs.staged_sizes(staging)
        place = self._files.send(digest, staging.config_path, staging.weights_path)
        self._sent[staging] = _Sent(place, began)

    def take_back(self, staging: Staging, digest: str) -> None:
        sent = self._sent.pop(staging, None)
        with self._mutex:
            is_kept = sent is not None and self._catalogue.places(digest).get(digest) == sent.place
        if sent is not None and not is_kept:
            self._files.take_back(digest, sent.place)

    def mend(self, staging: Staging, digest: str) -> None:
        place = self._places.get(digest)
        if place is not None and self._files.is_damaged(digest, place):
            self._files.mend(digest, place, staging.config_path, staging.weights_path)
            self._mended[staging] = place

    def bring(self, digest: str) -> None:
        if self.is_here(digest):
            return
        with self._fetching:
            place = self._places.get(digest)
            if self.is_here(digest) or place is None:
                return  # what reads them says that they are missing
            if self.lacking_bytes(digest) > 0:  # rather than fill the disk in vain
                raise StorageFullError(f"the disk has no room for the {self._num_bytes(digest)} bytes of its files")
            with self.stage() as staging:
                self._files.fetch(digest, place, staging)
                with self._files_here:
                    self._blobs.place(staging, digest)
            self._fresh.add(digest)

    def lacking_bytes(self, digest: str) -> int:
        return self._num_bytes(digest) - self._blobs.free_bytes()

    def _num_bytes(self, digest: str) -> int:
        with self._mutex:
            return self._catalogue.num_bytes(digest)

    def copies(self) -> Mapping[str, float]:
        return {digest: came_at for digest, came_at in self._blobs.came_at().items() if self.is_here(digest)}

    def is_elsewhere(self, digest: str) -> bool:
        place = self._places.get(digest)
        return place is not None and self._files.has(digest, place)

    def verify(self, digest: str) -> None:
        complaint = self._blobs.digest_complaint(digest)
        is_fresh = digest in self._fresh
        self._fresh.discard(digest)
        if complaint is None:
            return
        with self._files_here:  # what the store has is not kept here as well: it can be had as often as somebody asks
            self._blobs.discard(digest) if is_fresh else self._blobs.quarantine(digest)
        if is_fresh:
            if place := self._places.get(digest):
                self._files.note_damage(digest, place)
            raise AdapterFailedError(f"as the shared store has it: {complaint}: upload it again")
        raise StorageFailedError("the copy of its files was damaged, and is fetched again: try again")

    def discard_unreferenced(self, digest: str) -> bool:
        with self._files_here:
            return super().discard_unreferenced(digest)

    def tidy(self) -> None:
        """The log is kept short, and once an hour what nothing refers to is removed."""
        try:
            self._compaction.run(self.revision)
        finally:
            if time.monotonic() >= self._sweep_at:
                self._sweep_at = time.monotonic() + SWEEP_SECONDS
                self.sweep()

    def sweep(self) -> int:
        """Remove from the shared store what no version has referred to for long; how many objects."""
        listed = self._files.listed()
        if self.unread(self.revision)[0]:
            return 0  # one may be referred to by what is not known yet
        with self._mutex:
            referenced = set(self._catalogue.places().items())
        return self._files.remove(listed, referenced, self._noted)

    def is_here(self, digest: str) -> bool:
        return all(regular_size(path) is not None for path in self._blobs.paths(digest))

    def _size_complaint(self, digest: str, sizes: Sequence[int]) -> str | None:
        """A config may be written in another way here than where the version was made, and mean the same."""
        here = (self._blobs.config_bytes(digest), sizes[1])
        return super()._size_complaint(digest, here) if self.is_here(digest) else None

    def _find_damage(self) -> list[Quarantined]:
        for digest, *sizes, _failure in self._catalogue.blobs():
            if self._size_complaint(digest, sizes):
                self._blobs.quarantine(digest)
        self._blobs.fill_reserve()
        return []

    def _keep_or_place(self, staging: Staging, digest: str) -> bool:
        """Let versions refer to where the files lie; they are moved once the change is made."""
        if self._catalogue.places(digest):
            return staging in self._mended
        sent = self._sent.get(staging)
        if sent is None or sent.at.seconds_to(Moment.now()) > SWEPT_AFTER / 2:
            raise NotSentError
        self._catalogue.put_blob(digest, *self._blobs.staged_sizes(staging), sent.place)
        return False


def _lost(complaints: Sequence[str]) -> StoreUnreachableError:
    """That there is no snapshot of what is no more in the log."""
    told = "; ".join(complaints) or "the shared store has lost its snapshots"
    return StoreUnreachableError(f"{told}, and the changes before it are not in the log: bring it back from a backup")
