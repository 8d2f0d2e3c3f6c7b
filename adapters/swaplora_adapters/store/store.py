"""The durable store of adapters: content-addressed files, what they say of themselves, and a catalogue of it all.

    catalogue.sqlite3   lock   reserve
    blobs/<digest>/adapter_config.json, adapter_model.safetensors
    names/<name>        its versions, and what else is kept of it
    aliases/<alias>     where it leads
    staging/            on their way in, or on their way out
    quarantine/         what was found unusable, or unknown

A publish is durable when it returns: files synced, folder renamed into place, folder synced, the same for the name's
manifest, catalogue committed. What a crash leaves behind is whole, or swept at the next start. The catalogue can be
lost: it is made anew from the manifests.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from swaplora_adapters.errors import (
    AdapterFailedError,
    AdapterNotFoundError,
    AliasNotFoundError,
    GateFailedError,
    StorageFailedError,
    StorageFullError,
    VersionNotFoundError,
)
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.files.naming import validate_alias, validate_name, without_tenant
from swaplora_adapters.store.blobs import BlobPaths, Blobs
from swaplora_adapters.store.conditions import UNCONDITIONAL, Conditions
from swaplora_adapters.store.data_dir import DataDir
from swaplora_adapters.store.journal import Journal
from swaplora_adapters.store.manifests import Manifests, NotUndoneError
from swaplora_adapters.store.records import Alias, Details, Published, Quarantined, Standing, Touched, VersionRecord
from swaplora_adapters.store.recovery import Recovery
from swaplora_adapters.store.shared.extras import Extras
from swaplora_adapters.store.shared.history.entry import Entry
from swaplora_adapters.store.shared.identity import share_no_more
from swaplora_adapters.store.staging import Staging


class Store:
    """One process's hold on a data directory. Any thread may call any method.

    `quarantined` lists the versions whose files were found unusable at the start. They stay in the catalogue with their
    `failure`; publishing the same bytes again mends them. `notes` are for the operator: what else the start has mended.
    """

    def __init__(self, data_dir: Path) -> None:
        """Lock, open, migrate and recover `data_dir`, which is made if need be; StoreError if it cannot be used."""
        self._mutex = threading.RLock()
        self.extras: Extras | None = None  # what is shared besides, if anything is
        folders = DataDir(data_dir)
        self._blobs = Blobs(folders)
        self._names, self._aliases = (Manifests(f, folders.staging) for f in (folders.names, folders.aliases))
        self._lock_descriptor = folders.hold()
        try:
            recovery = Recovery(folders, self._blobs, self._names, self._aliases)
            self._catalogue = recovery.open_catalogue()
            self._journal = self._open(folders, recovery)
            self.notes = recovery.notes
            self.quarantined = self._find_damage()
        except BaseException:
            if "_catalogue" in vars(self):
                self._catalogue.close()
            os.close(self._lock_descriptor)
            raise

    def _open(self, folders: DataDir, recovery: Recovery) -> Journal:
        """What changes are made with, once catalogue and files agree."""
        if share_no_more(folders.shared):
            recovery.notes.append("a shared store was begun with this data directory and not made: it is of none now")
        revision = recovery.agree(self._catalogue)
        recovery.sweep(self._catalogue)
        return Journal(self._catalogue, self._names, self._aliases, self._blobs, revision)

    @property
    def revision(self) -> int:
        """That of the last change of anything that is known here."""
        return self._journal.revision

    @property
    def is_shared(self) -> bool:
        """Whether other servers change the same names, and see what is changed here."""
        return False

    @property
    def asked_at(self) -> float | None:
        """Since when a short call of what is shared waits for its answer, on the monotonic clock, if one does."""
        return None

    @property
    def is_awaited(self) -> bool:
        """Whether any call of what is shared waits for its answer, be it short or of files."""
        return False

    @property
    def heard_at(self) -> float:
        """When such a call was last answered."""
        return 0.0

    def unread(self, _revision: int) -> tuple[Sequence[Entry], bool]:
        """Changes after this one, and whether these are all. Raises StoreUnreachableError."""
        return (), True

    def catch_up(self, _entries: Sequence[Entry]) -> Touched:
        """Take over those of these changes that are not known yet, and say what all of them are of."""
        return Touched()

    def send(self, staging: Staging, digest: str) -> None:
        """Have staged files lie where all that share the store find them, before they are published."""

    def take_back(self, staging: Staging, digest: str) -> None:
        """Remove what was sent of these, whose publishing was refused."""

    def mend(self, staging: Staging, digest: str) -> None:
        """Send what versions have already, if it was found lost or damaged where all find it."""

    def is_here(self, _digest: str) -> bool:
        """Whether the files of a digest lie here, or nowhere."""
        return True

    def bring(self, digest: str) -> None:
        """Have the files of a digest lie here. Raises StoreUnreachableError, StorageFullError, AdapterFailedError."""

    def lacking_bytes(self, _digest: str) -> int:
        """What the disk lacks for that."""
        return 0

    def copies(self) -> Mapping[str, float]:
        """Of files that lie elsewhere, too, if they are not lost: digest → since when, in seconds since the epoch."""
        return {}

    def is_elsewhere(self, _digest: str) -> bool:
        """Whether what lies here can be had again. Raises StoreUnreachableError."""
        return False

    def take_out(self, digest: str) -> Callable[[], int]:
        """Have a copy be here no more, at once; what is returned frees its room, and says how many bytes."""
        return self._blobs.take_out(digest)

    def tidy(self) -> None:
        """What is to be done now and then, and may take long."""

    def close(self) -> None:
        """Let go of the data directory."""
        with self._mutex:
            self._catalogue.close()
            os.close(self._lock_descriptor)

    def stage(self) -> Staging:
        """A place on the same file system to write the two files of an adapter to; StorageFullError."""
        return self._blobs.stage()

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
        """Make the staged files the current version of `name`, or a candidate where that has a gate; then durable.

        A new version is made only if the current one has another digest, also where an older one has the same, and the
        newest is no candidate with these bytes. The current one's put again hold back for good what waits to follow it.
        With an `origin`, what `name` was taken in from is noted with that, also where there is no new version. Files
        are shared by digest, and files that are there and sound are not touched. Raises PreconditionFailedError
        if one of the `conditions` does not hold, InvalidAdapterNameError, InvalidAdapterError if a file is missing, and
        StorageFullError; then the store is as before. After StorageFailedError, too, but the next start may find the
        change made.
        """
        validate_name(without_tenant(name))
        with self._mutex:
            had_files, is_committing = self._blobs.has(details.digest), False
            try:
                with self._journal.change():
                    previous = self._catalogue.current(name)
                    conditions.check(name, self._catalogue.was_used(name), previous)
                    is_mended = self._keep_or_place(staging, details.digest)
                    stored = self._same(name, previous, details.digest)
                    is_new = stored is None
                    if is_new:
                        self._catalogue.add_version(name, details, source)
                    is_told = (stored == previous and self._catalogue.put_back(name)) or is_mended
                    if origin is not None:
                        self._catalogue.set_origin(name, origin)
                    if is_new or is_told or origin is not None:
                        self._journal.write_name(name)
                    is_committing = True
            except BaseException as error:
                # a commit that fails for anything but room may stand at the next start, and would want its files
                may_stand = isinstance(error, NotUndoneError) or (
                    is_committing and not isinstance(error, StorageFullError)
                )
                if not (had_files or may_stand or self.is_shared):
                    self._blobs.discard(details.digest)
                raise
            record = self.versions(name)[-1] if stored is None else self.version(name, stored.version)
            return Published(record, is_new, previous)

    def current(self, name: str) -> VersionRecord:
        """The version that `name` stands for; AdapterNotFoundError."""
        with self._mutex:
            record = self._catalogue.current(name)
        if record is None:
            raise AdapterNotFoundError(f"there is no adapter named {name!a}")
        return record

    def versions(self, name: str) -> list[VersionRecord]:
        """All versions of a name, oldest first; AdapterNotFoundError if there is none."""
        with self._mutex:
            records = self._catalogue.versions(name)
        if not records:
            raise AdapterNotFoundError(f"there is no adapter named {name!a}")
        return records

    def version(self, name: str, version: int) -> VersionRecord:
        """One version by number; AdapterNotFoundError or VersionNotFoundError."""
        found = next((record for record in self.versions(name) if record.version == version), None)
        if found is None:
            raise VersionNotFoundError(f"adapter {name!a} has no version {version}")
        return found

    def names(self) -> list[str]:
        """Every name, in order."""
        with self._mutex:
            return self._catalogue.names()

    def change(
        self,
        name: str,
        *,
        current: int | None = None,
        is_pinned: bool | None = None,
        shared_with: Sequence[str] | None = None,
        is_forced: bool = False,
    ) -> None:
        """Let `name` stand for another of its versions, pin it, share it, or all at once.

        A version that `is_forced` is noted to be current though it has not passed.

        Raises AdapterNotFoundError, VersionNotFoundError and StorageFullError; then nothing has changed.
        """
        with self._mutex:
            if current is None:
                self.current(name)
            else:
                self.version(name, current)
            with self._journal.change():
                if current is not None:
                    self._catalogue.set_current(name, current)
                    if is_forced:
                        verdict = self.version(name, current).verdict
                        self._catalogue.set_standing(name, current, Standing.FORCED, verdict)
                    self._let_pass(name)
                if is_pinned is not None:
                    self._catalogue.set_pinned(name, is_pinned)
                if shared_with is not None:
                    self._catalogue.set_shared_with(name, shared_with)
                self._journal.write_name(name)

    def is_pinned(self, name: str) -> bool:
        """Whether the current version of `name` is to stay in memory."""
        with self._mutex:
            return self._catalogue.is_pinned(name)

    def shared_with(self, name: str) -> tuple[str, ...]:
        """The tenants, besides whose it is, that may ask `name`, which is there."""
        with self._mutex:
            return self._catalogue.shared_with(name)

    def gate(self, name: str) -> str | None:
        """What new versions of `name` must show, in words that are not ours."""
        with self._mutex:
            return self._catalogue.gate(name)

    def set_gate(self, name: str, gate: str | None) -> None:
        """Have new versions of `name`, which is there, be candidates; None lets each be current at once."""
        with self._mutex, self._journal.change():
            self._let_pass(name)  # it has been current without one until now
            self._catalogue.set_gate(name, gate)
            self._let_pass(name)
            self._journal.write_name(name)

    def judge(self, name: str, version: int, standing: Standing, verdict: str, *, is_current: bool) -> None:
        """Note what has become of a candidate, and let `name` stand for it if `is_current`: both or neither.

        Raises StorageFullError.
        """
        with self._mutex, self._journal.change():
            self._catalogue.set_standing(name, version, standing, verdict)
            if is_current:
                self._catalogue.set_current(name, version)
            self._journal.write_name(name)

    def origins(self, name: str | None = None) -> dict[str, str | None]:
        """What each name was last taken in from by itself, for all that were ever used, the deleted ones too."""
        with self._mutex:
            return self._catalogue.origins(name)

    def folders(self) -> dict[str, tuple[str, str]]:
        """Name → what its folder here was known by when it was last read, and the digest of what was read."""
        with self._mutex:
            return self._catalogue.folders()

    def put_folder(self, name: str, origin: str, digest: str) -> None:
        """Note, for this server alone, that a name's folder was read; StorageFullError."""
        with self._mutex, self._catalogue.transaction():
            self._catalogue.put_folder(name, origin, digest)

    def aliases(self, alias: str | None = None) -> list[Alias]:
        """All, in order of alias, or the one that is called so."""
        with self._mutex:
            return self._catalogue.aliases(alias)

    def put_alias(self, alias: Alias) -> None:
        """Make an alias, or let it stand for something else; InvalidAdapterNameError, StorageFullError."""
        validate_alias(without_tenant(alias.alias))
        with self._mutex, self._journal.change():
            self._journal.put_alias(alias)

    def remove_alias(self, alias: str) -> None:
        """Raises AliasNotFoundError. Works on a full disk too."""
        with self._mutex:
            if not self._journal.even_if_full(lambda is_hard: self._journal.remove_alias(alias, may_be_none=is_hard)):
                raise AliasNotFoundError(f"there is no alias called {alias[:128]!r}")

    def delete(self, name: str, version: int | None = None) -> list[VersionRecord]:
        """Remove a name, or one version of it, and return what was removed; the files stay until they are discarded.

        Without its current version a name stands for the newest that remains, of those that its gate lets. Its version
        numbers never start again. Works on a full disk too, where the reserve makes room for the catalogue's own
        change. Raises AdapterNotFoundError, VersionNotFoundError, and GateFailedError if none is left that may follow.
        """
        with self._mutex:
            doomed = self.versions(name) if version is None else [self.version(name, version)]
            self._check_follows(name, doomed)
            self._journal.even_if_full(lambda is_hard: self._remove_versions(name, doomed, is_hard))
            return doomed

    def discard_unreferenced(self, digest: str) -> bool:
        """Remove a blob's files for good if no version refers to them any more; whether that was so."""
        with self._mutex:
            if self._catalogue.is_referenced(digest):
                return False
            self._blobs.discard(digest)
            self._blobs.fill_reserve()
            return True

    def blob_paths(self, digest: str) -> BlobPaths:
        """Where the files of a digest lie, or would lie."""
        return self._blobs.paths(digest)

    def verify(self, digest: str) -> None:
        """Hash a blob's files again; unusable ones are quarantined, and AdapterFailedError carries the reason."""
        with self._mutex:
            failure = self._catalogue.failure(digest)
        if failure is None and self._blobs.digest_complaint(digest) is None:
            return
        with self._mutex:  # where a publish of the same bytes may have mended it by now
            failure = self._catalogue.failure(digest) or self._blobs.digest_complaint(digest)
            if failure is None:
                return
            self._give_up(digest, failure)
        raise AdapterFailedError(failure)

    def check_integrity(self) -> None:
        """Raise StoreError unless the catalogue is sound and every version's files are there or known to be bad."""
        with self._mutex:
            complaints = self._catalogue.complaints()
            for digest, *sizes, failure in self._catalogue.blobs():
                if failure is None and (complaint := self._size_complaint(digest, sizes)):
                    complaints.append(f"{digest}: {complaint}")
        if complaints:
            raise StoreError("; ".join(complaints))

    def _size_complaint(self, digest: str, sizes: Sequence[int]) -> str | None:
        return self._blobs.size_complaint(digest, sizes)

    def _same(self, name: str, current: VersionRecord | None, digest: str) -> VersionRecord | None:
        """The version that these bytes are already, if they were put again: the current one, or the newest one held."""
        if current is None or current.digest == digest:
            return current
        newest = self._catalogue.versions(name)[-1]
        is_held = self._catalogue.gate(name) is not None and newest.standing in (Standing.CANDIDATE, Standing.FAILED)
        return newest if is_held and newest.digest == digest and not newest.is_put_back else None

    def _let_pass(self, name: str) -> None:
        """Where there is no gate, the current version counts as passed."""
        if self._catalogue.gate(name) is None:
            self._catalogue.let_pass(name)

    def _check_follows(self, name: str, doomed: Sequence[VersionRecord]) -> None:
        left = [record for record in self.versions(name) if record not in doomed]
        is_held = bool(left) and self._catalogue.gate(name) is not None
        if is_held and self.current(name) in doomed and not any(record.has_passed for record in left):
            raise GateFailedError(
                f"{name} would stand for nothing: the versions that would be left have not passed its gate; "
                "make one of them current by force first, or delete all of it"
            )

    def _keep_or_place(self, staging: Staging, digest: str) -> bool:
        """Whether others are to hear of it though the name stays as it is.

        Files that others rely on are replaced only if they are damaged: a crash could part them from their row.

        The same digest does not mean the same bytes, since a config is digested by what it means.
        """
        is_recorded = self._catalogue.is_blob(digest) and self._catalogue.failure(digest) is None
        if not (is_recorded and self._blobs.digest_complaint(digest) is None):
            self._catalogue.put_blob(digest, *self._blobs.place(staging, digest))
        return False

    def _remove_versions(self, name: str, doomed: Sequence[VersionRecord], is_hard: bool) -> None:
        self._catalogue.remove_versions(doomed)
        self._let_pass(name)
        may_be_none = is_hard and self._catalogue.current(name) is None
        self._journal.write_name(name, [record.digest for record in doomed], may_be_none=may_be_none)

    def _find_damage(self) -> list[Quarantined]:
        """Set aside what is damaged, and list the versions that cannot be used."""
        for digest, *sizes, failure in self._catalogue.blobs():
            complaint = self._blobs.size_complaint(digest, sizes)
            if complaint and failure is None:
                self._give_up(digest, complaint)
            elif failure is not None and complaint is None:
                self._mark(digest, None)
        self._blobs.fill_reserve()
        return [Quarantined(r.name, r.version, r.failure or "") for r in self._catalogue.failed()]

    def _give_up(self, digest: str, reason: str) -> None:
        """Quarantine a blob that versions refer to, and mark them."""
        if self._catalogue.is_referenced(digest):
            self._blobs.quarantine(digest)
            self._mark(digest, reason)

    def _mark(self, digest: str, failure: str | None) -> None:
        """Note what was found about a blob; a full disk leaves that to the next start, which finds it again."""
        with suppress(StorageFullError, StorageFailedError), self._catalogue.transaction():
            self._catalogue.mark_blob(digest, failure)
