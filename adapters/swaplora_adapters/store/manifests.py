"""What the files say of themselves: for each name, or each alias, one small file that is replaced whole.

    names/<name>        one line of JSON, and a line with its sha256; a slash of an alias is written as %

A manifest is durable before the catalogue commits what it says, so it is never the older of the two. One of what was
deleted stays, and says so: nothing comes back because its catalogue was lost.
"""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from swaplora_adapters.errors import StorageFailedError
from swaplora_adapters.files.disk import StoreError, raising_storage_errors, sync_folder
from swaplora_adapters.store.staging import Writer

FORMAT = 1
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)  # of file systems that know none
_SLASH = "%"  # in a file's name: an alias may have slashes, and neither that nor a name has this
Facts = dict[str, Any]  # JSON


class NotUndoneError(StorageFailedError):
    """A change failed on a disk that did not let it be taken back: the next start may find it made."""


class Manifest(NamedTuple):
    """All that is to be known of a name or of an alias, as of a revision; revisions count changes of any of them."""

    revision: int
    facts: Facts


class Manifests:
    """The manifests in one folder, which are written in `staging`. For one thread at a time."""

    def __init__(self, folder: Path, staging: Path) -> None:
        self._folder = folder
        self._staging = staging
        self._replaced: list[tuple[Path, Path | None]] = []  # and where what was there before lies, if anything was
        self._leftovers: list[Path] = []

    def read(self) -> tuple[dict[str, Manifest], list[Path]]:
        """All that are sound, by name, and the files that are not; StoreError for those of a newer release."""
        found: dict[str, Manifest] = {}
        damaged: list[Path] = []
        if not self._folder.exists():
            return found, damaged
        with raising_storage_errors(), os.scandir(self._folder) as entries:
            for entry in entries:
                name = entry.name.replace(_SLASH, "/")
                manifest = _decoded(name, _read(entry.path) if entry.is_file(follow_symlinks=False) else b"")
                if manifest is None:
                    damaged.append(Path(entry.path))
                else:
                    found[name] = manifest
        return found, damaged

    def put(self, name: str, manifest: Manifest) -> None:
        """Write or replace one, in an `undone_on_error`; durable when this returns.

        Raises StorageFullError and StorageFailedError.
        """
        staged, target, content = self._beside(), self.path(name), _encoded(name, manifest)
        with raising_storage_errors():
            with Writer(staged, len(content)) as writer:
                writer.write(content)
            before = self._kept(target)
            staged.replace(target)
            self._replaced.append((target, before))
            sync_folder(self._folder)

    def put_all(self, manifests: Mapping[str, Manifest]) -> None:
        """Write or replace many, with one wait for the disk. StorageFullError, StorageFailedError."""
        with raising_storage_errors(), self.undone_on_error():
            staged = {name: self._beside() for name in manifests}
            for name, path in staged.items():
                path.write_bytes(_encoded(name, manifests[name]))
            if staged:
                os.sync()
            for name, path in staged.items():
                path.replace(self.path(name))
            sync_folder(self._folder)

    def take_away(self, name: str) -> None:
        """Remove one, in an `undone_on_error`, where none can be written; as durably as a failing disk lets it be."""
        target, before = self.path(name), self._beside()
        with raising_storage_errors(), suppress(FileNotFoundError):
            target.rename(before)
            self._replaced.append((target, before))
            with suppress(OSError):
                sync_folder(self._folder)

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """What the block puts is taken back if it raises; NotUndoneError if that fails."""
        try:
            yield
        except BaseException as error:
            self._undo(error)
            raise
        finally:
            for leftover in self._leftovers:
                with suppress(OSError):  # what a failing disk does not let go of is swept at the next start
                    leftover.unlink(missing_ok=True)
            self._leftovers.clear()
            self._replaced.clear()

    def path(self, name: str) -> Path:
        """Where one is, or would be."""
        return self._folder / name.replace("/", _SLASH)

    def _beside(self) -> Path:
        """A path in staging that is not there and, when the change has ended, is not there again."""
        self._leftovers.append(self._staging / secrets.token_hex(16))
        return self._leftovers[-1]

    def _kept(self, target: Path) -> Path | None:
        """A second place for the file that is to be replaced: to bring it back needs no room."""
        before = self._beside()
        try:
            os.link(target, before)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            content = _read(str(target))
            with Writer(before, len(content)) as writer:
                writer.write(content)
        return before

    def _undo(self, error: BaseException) -> None:
        try:
            for target, before in reversed(self._replaced):
                if before is None:
                    target.unlink()
                else:
                    before.replace(target)
            if self._replaced:
                sync_folder(self._folder)
        except OSError as failure:
            raise NotUndoneError(f"the disk that holds the adapters failed: {failure.strerror}") from error


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _encoded(name: str, manifest: Manifest) -> bytes:
    content = json.dumps({"format": FORMAT, "name": name, **manifest._asdict()}).encode()
    return b"%b\n%b\n" % (content, hashlib.sha256(content).hexdigest().encode())


def _decoded(name: str, raw: bytes) -> Manifest | None:
    """None for what is damaged, or is another's."""
    content, _, checksum = raw.partition(b"\n")
    if checksum != hashlib.sha256(content).hexdigest().encode() + b"\n":
        return None
    read = json.loads(content)
    if read["format"] > FORMAT:
        raise StoreError(f"the description of {name} was written by a newer release: start that one")
    return Manifest(read["revision"], read["facts"]) if read["name"] == name else None
