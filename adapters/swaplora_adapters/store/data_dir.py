"""The folders of a data directory, and its quarantine: what is doubted is moved there, never away."""

import fcntl
import os
from itertools import count
from pathlib import Path

from swaplora_adapters.files.disk import StoreError, raising_storage_errors

_MAX_ASIDE_CHARS = 200  # a number may follow, and a file's name has 255 bytes
_FILES = ("catalogue.sqlite3", "lock", "reserve", "shared", "unreferenced.json")


class DataDir:
    """Where everything lies. A link is refused, since what it leads to would be emptied or written over.

    The folders of manifests are not there before `make_manifest_folders`: without them nothing has been described.
    """

    def __init__(self, data_dir: Path) -> None:
        """Make what is missing; StoreError for a directory that cannot be used as it is."""
        self.blobs, self.names, self.aliases = data_dir / "blobs", data_dir / "names", data_dir / "aliases"
        self.staging, self.quarantine = data_dir / "staging", data_dir / "quarantine"
        self.catalogue, self.lock, self.reserve, self.shared, self.unreferenced = (data_dir / name for name in _FILES)
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in (
                self.names,
                self.aliases,
                self.catalogue,
                self.lock,
                self.reserve,
                self.shared,
                self.unreferenced,
            ):
                _refuse_link(path)
            for folder in (self.blobs, self.staging, self.quarantine):
                _make(folder)
        except OSError as error:
            raise unusable(data_dir, error) from error

    def hold(self) -> int:
        """An exclusive lock on all of it, until the descriptor is closed or the process ends; StoreError."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode=0o600)
        except OSError as error:
            raise unusable(self.lock.parent, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StoreError("the data directory is in use by another process") from None
        return descriptor

    @property
    def has_manifests(self) -> bool:
        """Whether a release that describes what it stores has used the directory."""
        return self.names.exists()

    def make_manifest_folders(self) -> None:
        """Make the folders of manifests if need be."""
        try:
            for folder in (self.names, self.aliases):
                _make(folder)
        except OSError as error:
            raise unusable(self.names.parent, error) from error

    def set_aside(self, path: Path, name: str) -> Path:
        """Move a file or a folder into the quarantine, over nothing that lies there; returns where it is now."""
        with raising_storage_errors():
            return path.rename(self.place_aside(name))

    def place_aside(self, name: str) -> Path:
        """A path in the quarantine that nothing has: `name`, or that with a number."""
        name = name[:_MAX_ASIDE_CHARS]
        names = (name if number == 1 else f"{name}.{number}" for number in count(1))
        return next(path for path in map(self.quarantine.joinpath, names) if not os.path.lexists(path))


def unusable(data_dir: Path, error: OSError) -> StoreError:
    """What is told of a data directory that cannot be read and written."""
    what = "" if error.filename is None or data_dir == Path(error.filename) else f" ({Path(error.filename).name})"
    return StoreError(
        f"the data directory {data_dir} cannot be used{what}: {error.strerror}; choose another --data-dir"
    )


def _make(folder: Path) -> None:
    _refuse_link(folder)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(None, "it may not be read and written", str(folder))


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise StoreError(f"{path} is a link, and nothing in a data directory may be one: put what it leads to there")
