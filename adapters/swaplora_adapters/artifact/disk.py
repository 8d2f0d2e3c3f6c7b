"""Files handled so that neither a strange file nor a full disk comes as a surprise."""

import errno
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from swaplora_adapters.errors import InvalidAdapterError, StorageFullError


def open_regular(path: Path) -> FileIO:
    """Open a regular file for unbuffered reading; InvalidAdapterError if it is missing or anything else.

    A pipe is never waited for. The message names the file, not the folder it lies in.
    """
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
def full_disk_is_told() -> Iterator[None]:
    """Turn the body's running out of room, in a file or in SQLite, into StorageFullError; the rest passes."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError("no room is left on the disk that holds the adapters") from error
        raise
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE):
            raise StorageFullError("no room is left on the disk that holds the adapters") from error
        raise
