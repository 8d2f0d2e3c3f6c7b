"""Files handled so that neither a strange file nor a full or failing disk comes as a surprise."""

import errno
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from swaplora_adapters.errors import InvalidAdapterError, StorageFailedError, StorageFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FAILED = (errno.EIO, errno.EROFS)  # the second is what many file systems turn to after the first
_SQLITE_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
_SQLITE_FAILED = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)  # primary codes
_SQLITE_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class StoreError(RuntimeError):
    """The data directory cannot be used as it is. Meant for the operator: the message says what is wrong with it."""


def open_regular(path: Path) -> FileIO:
    """Open a regular file for unbuffered reading; InvalidAdapterError if it is missing or anything else.

    A pipe is never waited for. The message names the file, not the folder it lies in. Also raises StorageFailedError.
    """
    with raising_storage_errors():
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise InvalidAdapterError([f"{path.name} is missing"]) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidAdapterError([f"{path.name} is not a regular file"])
    return FileIO(descriptor, "r")


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The whole of a small regular file; InvalidAdapterError if it has more than `max_bytes` bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise InvalidAdapterError([f"{path.name} is larger than {max_bytes} bytes"])
        return file.read(max_bytes + 1)


def regular_size(path: Path) -> int | None:
    """The size in bytes of what lies at `path` if that is a regular file itself, no link to one; else None."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def sync_folder(folder: Path) -> None:
    """Make names created in, moved into or removed from `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, if there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def raising_storage_errors() -> Iterator[None]:
    """Turn a full disk met in the body, by a file or by SQLite, into StorageFullError; the rest passes.

    A disk that fails, or has changed the catalogue, becomes StorageFailedError. SQLite says only that for no room at a
    sync, too.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full() from error
        if error.errno in _FAILED:
            raise _failed(error.strerror) from error
        raise
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in _SQLITE_FULL:
            raise _full() from error
        if error.sqlite_errorcode & 0xFF in _SQLITE_FAILED:
            raise _failed(str(error)) from error
        raise
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _SQLITE_DAMAGED:
            raise _failed(f"the catalogue is damaged ({error}); the next start rebuilds it") from error
        raise


def _full() -> StorageFullError:
    return StorageFullError("no room is left on the disk that holds the adapters")


def _failed(answer: str | None) -> StorageFailedError:
    return StorageFailedError(f"the disk that holds the adapters failed: {answer}")
