"""The files of stored adapters: one folder per digest, moved in and out whole. Knows no names or versions."""

import os
import secrets
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from swaplora_adapters.config.parse import MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH, parse_spec
from swaplora_adapters.config.spec import AdapterSpec
from swaplora_adapters.errors import AdapterFailedError, InvalidAdapterError, UnsupportedAdapterError
from swaplora_adapters.files.digest import digest_of, hex_of, is_hex
from swaplora_adapters.files.disk import raising_storage_errors, read_bounded, regular_size, remove, sync_folder
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.files.strict_json import loads
from swaplora_adapters.store.data_dir import DataDir
from swaplora_adapters.store.staging import Staging

RESERVE_BYTES = 256 << 10


class BlobPaths(NamedTuple):
    """Where a blob's two files lie."""

    config: Path
    weights: Path


class Blobs:
    """What lies in the folder `blobs` of a data directory, and a reserve of room for a full disk."""

    def __init__(self, folders: DataDir) -> None:
        self._folders = folders
        self._blobs, self._staging, self._reserve = folders.blobs, folders.staging, folders.reserve

    def stage(self) -> Staging:
        """A new folder on the same file system; StorageFullError."""
        return Staging(self._staging)

    def paths(self, digest: str) -> BlobPaths:
        """Where the files of a digest lie, or would lie."""
        folder = self._folder(digest)
        return BlobPaths(folder / CONFIG_FILE, folder / WEIGHTS_FILE)

    def digests(self) -> list[str]:
        """Of all that lie here."""
        return [f"sha256:{path.name}" for path in self._blobs.iterdir() if is_hex(path.name)]

    def came_at(self) -> dict[str, float]:
        """Digest → when its files came, in seconds since the epoch."""
        digests = self.digests()
        return {digest: self._folder(digest).lstat().st_mtime for digest in digests if self.has(digest)}

    def free_bytes(self) -> int:
        """Of the disk."""
        return shutil.disk_usage(self._staging).free

    def is_empty(self) -> bool:
        """Whether there is no blob at all."""
        return next(self._blobs.iterdir(), None) is None

    def has(self, digest: str) -> bool:
        """Whether anything lies where the digest's files would."""
        return os.path.lexists(self._folder(digest))

    def place(self, staging: Staging, digest: str) -> tuple[int, int]:
        """Move the staged files to their blob, over any files it has; durable when this returns their sizes."""
        sizes = self.staged_sizes(staging)
        folder = self._folder(digest)
        if folder.is_symlink() or not folder.is_dir():
            remove(folder)
            sync_folder(staging.path)
            staging.path.rename(folder)
        else:
            for source, target in zip((staging.config_path, staging.weights_path), self.paths(digest), strict=True):
                source.replace(target)
            sync_folder(folder)
        sync_folder(self._blobs)
        return sizes

    @staticmethod
    def staged_sizes(staging: Staging) -> tuple[int, int]:
        """Of both files, in bytes; InvalidAdapterError if one is missing."""
        sizes = regular_size(staging.config_path), regular_size(staging.weights_path)
        if sizes[0] is None or sizes[1] is None:
            raise InvalidAdapterError([f"{CONFIG_FILE} and {WEIGHTS_FILE} must both be sent"])
        return sizes[0], sizes[1]

    def discard(self, digest: str) -> None:
        """Remove a blob, if there: out of the way in one step, then gone."""
        self.take_out(digest)()

    def take_out(self, digest: str) -> Callable[[], int]:
        """Have a blob, if there, be here no more, in one step; what is returned frees its room, and says how much.

        What a crash leaves in staging, or a failing disk anywhere, is swept at the next start.
        """
        doomed = self._staging / secrets.token_hex(16)

        def free() -> int:
            freed = 0
            with suppress(OSError):
                freed = sum(path.lstat().st_size for path in doomed.iterdir())
                remove(doomed)
            return freed

        if self.has(digest):
            with suppress(OSError):
                self._folder(digest).rename(doomed)
        return free

    def quarantine(self, digest: str) -> None:
        """Set a blob aside, if there; on a failing disk it stays where it is."""
        if self.has(digest):
            with suppress(OSError):
                self._folders.set_aside(self._folder(digest), hex_of(digest))

    def sweep(self, known: Collection[str], removed: Collection[str]) -> int:
        """Empty the staging folder, remove the blobs of `removed`, and set aside all that are not `known`: how many."""
        for leftover in self._staging.iterdir():
            remove(leftover)
        known_folders, removed_folders = ({hex_of(digest) for digest in digests} for digests in (known, removed))
        unknown = [path for path in self._blobs.iterdir() if path.name not in known_folders]
        doomed = [path for path in unknown if path.name in removed_folders]
        for path in doomed:
            remove(path)
        for path in set(unknown).difference(doomed):
            self._folders.set_aside(path, path.name)
        return len(unknown) - len(doomed)

    def config_bytes(self, digest: str) -> int:
        """The size of the config that lies there: what is the same adapter may be written in more than one way."""
        return regular_size(self.paths(digest).config) or 0

    def size_complaint(self, digest: str, sizes: Sequence[int]) -> str | None:
        """What is wrong with the files at a glance: whether they are there and have these sizes in bytes."""
        for path, size in zip(self.paths(digest), sizes, strict=True):
            found = regular_size(path)
            if found is None:
                return f"its stored {path.name} is missing"
            if found != size:
                return f"its stored {path.name} has {found} bytes instead of {size}"
        return None

    def digest_complaint(self, digest: str) -> str | None:
        """What is wrong with the files once every byte is hashed again; StorageFailedError if the disk is at fault.

        Raises AdapterFailedError for a whole config that this release refuses: no damage, the files stay.
        """
        paths = self.paths(digest)
        try:
            with raising_storage_errors():
                config = read_bounded(paths.config, MAX_CONFIG_BYTES)
                loads(config, what=CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES, max_depth=MAX_CONFIG_DEPTH)
                if digest_of(_accepted(config).canonical, paths.weights) == digest:
                    return None
        except InvalidAdapterError as error:
            return f"its stored files are damaged: {error}"
        return "its stored files no longer have the digest that they were stored with"

    def fill_reserve(self) -> None:
        """Hold back the room that a delete needs; a full or failing disk can only wait for the next chance."""
        with suppress(OSError), self._reserve.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)

    def free_reserve(self) -> None:
        """Give the room back to the disk."""
        with raising_storage_errors():
            self._reserve.unlink(missing_ok=True)

    def _folder(self, digest: str) -> Path:
        return self._blobs / hex_of(digest)


def _accepted(config: bytes) -> AdapterSpec:
    try:
        return parse_spec(config)
    except (InvalidAdapterError, UnsupportedAdapterError) as error:
        raise AdapterFailedError(f"its stored config is refused by this release: {error}") from error
