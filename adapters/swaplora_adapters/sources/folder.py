"""Adapters from sub-folders of the adapter folder, whose links may not lead out of it."""

import os
from io import FileIO
from pathlib import Path

from swaplora_adapters.config.parse import MAX_CONFIG_BYTES
from swaplora_adapters.errors import (
    InvalidAdapterError,
    SourceFailedError,
    SourceNotAllowedError,
    SourceNotFoundError,
)
from swaplora_adapters.files.disk import open_regular
from swaplora_adapters.sources.transfer import CHUNK_BYTES, missing, reading, receive
from swaplora_adapters.sources.uri import FOLDER, FolderUri
from swaplora_adapters.store.staging import FILE_NAMES, Part, Staging


class ReplacedMeanwhileError(SourceFailedError):
    """What was read may be the old one of the two files and the new other."""


def fetch_from_folder(uri: FolderUri, root: Path, staging: Staging, max_weights_bytes: int) -> str:
    """Copy both files of the folder that `uri` names below `root`; returns where it really lies, relative to `root`.

    Raises SourceNotAllowedError, SourceNotFoundError, SourceFailedError, InvalidAdapterError, AdapterTooLargeError,
    and ReplacedMeanwhileError for files that changed while they were read.
    """
    real_root = Path(os.path.realpath(root))
    folder = _below(real_root, real_root / uri.path, uri)
    if not os.path.isdir(folder):
        raise SourceNotFoundError(f"{uri}: there is no such folder in the adapter folder")
    before = origin_of(folder)
    limits: dict[Part, int] = {"config": MAX_CONFIG_BYTES, "weights": max_weights_bytes}
    for part, max_bytes in limits.items():
        _copy(uri, _below(real_root, folder / FILE_NAMES[part], uri), staging, part, max_bytes)
    if origin_of(folder) != before:
        raise ReplacedMeanwhileError(f"{uri}: its files were replaced while they were read; try again")
    return FOLDER + str(folder.relative_to(real_root))


def _below(root: Path, path: Path, uri: FolderUri) -> Path:
    """Where `path` really lies. What lies outside is refused whether or not it exists, so that nobody can probe."""
    real = Path(os.path.realpath(path))
    if root not in real.parents:
        raise SourceNotAllowedError(f"{uri}: only what lies below the folder given as --adapter-dir is read")
    return real


def _copy(uri: FolderUri, path: Path, staging: Staging, part: Part, max_bytes: int) -> None:
    step = reading(uri, part)
    if not os.path.lexists(path):
        raise missing(step, part)
    with _opened(path, step) as file:
        receive(iter(lambda: _read(file, step), b""), staging, part, max_bytes, step)


def _opened(path: Path, step: str) -> FileIO:
    try:
        return open_regular(path)
    except InvalidAdapterError as error:
        raise InvalidAdapterError([f"{step}: {reason}" for reason in error.reasons]) from None
    except OSError as error:
        raise _failed(step, error) from None


def _read(file: FileIO, step: str) -> bytes:
    try:
        return file.read(CHUNK_BYTES)
    except OSError as error:
        raise _failed(step, error) from None


def _failed(step: str, error: OSError) -> SourceFailedError:
    return SourceFailedError(f"{step}: {error.strerror or type(error).__name__}")


def origin_of(folder: Path) -> str:
    """What the files of a folder are known by without being read: its path, and their times (ns) and sizes."""
    stats = [_stat(folder / file) for file in FILE_NAMES.values()]
    return f"{folder.resolve()} {' '.join(stats)}"


def _stat(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "-"
    return f"{status.st_mtime_ns}:{status.st_size}"
