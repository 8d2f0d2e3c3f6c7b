"""Objects in a folder that all servers see: link(2), which fails where there is something, is the only lock."""

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from swaplora_adapters.files.disk import StoreError, raising_storage_errors, sync_folder
from swaplora_adapters.store.shared.objects import Listed
from swaplora_adapters.store.shared.trying import telling

_STAGING = "staging"  # below the folder
_SWEPT_AFTER = 24 * 3600.0  # seconds: what was not written to for so long there, a crash has left


class FolderObjects:
    """See `Objects`. A key is a path below `root`; the file system must know hard links, as NFS does."""

    def __init__(self, root: Path) -> None:
        """StoreError if it cannot be used, or is not there: what is not mounted is not to become another store."""
        self._root = root
        self._staging = root / _STAGING
        if not root.is_dir():
            raise StoreError(f"the shared store {root} is not there: mount it, or make the folder if it is to be new")
        try:
            self._staging.mkdir(exist_ok=True)
            self._sweep()
        except OSError as error:
            raise StoreError(f"the shared store {root} cannot be used: {error.strerror}") from error

    def get(self, key: str) -> bytes | None:
        with _told():
            try:
                return (self._root / key).read_bytes()
            except FileNotFoundError:
                self._check_mounted()
                return None

    def create(self, key: str, content: bytes) -> bool:
        path = self._root / key
        with _told(), self._staged() as staged:
            with staged.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self._make_folder(path.parent)
            try:
                os.link(staged, path)
                return True
            except FileExistsError:
                return False
            finally:
                sync_folder(path.parent)  # where it was there, too: perhaps by a try of ours that was not heard of

    def put(self, key: str, path: Path) -> None:
        target = self._root / key
        with _told(), self._staged() as staged:
            shutil.copyfile(path, staged)
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            self._make_folder(target.parent)
            staged.replace(target)
            sync_folder(target.parent)

    def fetch(self, key: str, path: Path) -> bool:
        with _told():
            try:
                source = (self._root / key).open("rb")
            except FileNotFoundError:
                self._check_mounted()
                return False
            with source, raising_storage_errors(), path.open("xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            return True

    def under(self, prefix: str) -> list[Listed]:
        folder, now = self._root / prefix.rpartition("/")[0], time.time()
        with _told():
            keys = sorted(key for key in self._keys(folder) if key.startswith(prefix))
            self._check_mounted()  # what is not listed is not there
            ages = ((key, self._age(key, now)) for key in keys)
            return [Listed(key, age) for key, age in ages if age is not None]

    def remove(self, key: str) -> None:
        path = self._root / key
        with _told():
            path.unlink(missing_ok=True)
            with suppress(OSError):  # it is not empty
                path.parent.rmdir()

    def _keys(self, folder: Path) -> Iterator[str]:
        """OSError for a folder that may not be read."""

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        for path, _, names in os.walk(folder, onerror=fail):
            yield from ((Path(path) / name).relative_to(self._root).as_posix() for name in names)

    def _age(self, key: str, now: float) -> float | None:
        with suppress(FileNotFoundError):  # it was removed meanwhile
            return now - (self._root / key).stat().st_mtime
        return None

    def _check_mounted(self) -> None:
        """Raise OSError where all of it is gone: what is not found then may be there."""
        self._staging.stat()

    def _sweep(self) -> None:
        for path in self._staging.iterdir():
            with suppress(FileNotFoundError):  # another server's, which is done with it
                if time.time() - path.stat().st_mtime > _SWEPT_AFTER:
                    path.unlink()

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        path = self._staging / secrets.token_hex(16)
        try:
            yield path
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        """Each that is missing, durably."""
        if not folder.is_dir():
            self._make_folder(folder.parent)
            with suppress(FileExistsError):
                folder.mkdir()
            sync_folder(folder.parent)


def _told() -> AbstractContextManager[None]:
    """The texts of these errors hold paths."""
    return telling(OSError, lambda error: f"the shared store cannot be used: {error.strerror}; try again")
