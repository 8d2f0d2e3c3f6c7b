"""Files on their way in: written below the data directory, counted, made durable, gone unless published."""

import os
import secrets
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from swaplora_adapters.errors import AdapterTooLargeError, InvalidAdapterError
from swaplora_adapters.files.disk import raising_storage_errors, remove
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.priority import pause

Part = Literal["config", "weights"]
FILE_NAMES: dict[Part, str] = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}


class Staging:
    """A new folder for the two files of one adapter. As a context manager it removes what was not published."""

    def __init__(self, parent: Path) -> None:
        self.path = parent / secrets.token_hex(16)
        with raising_storage_errors():
            self.path.mkdir(mode=0o700)

    @property
    def config_path(self) -> Path:
        """Where adapter_config.json is written."""
        return self.path / FILE_NAMES["config"]

    @property
    def weights_path(self) -> Path:
        """Where adapter_model.safetensors is written."""
        return self.path / FILE_NAMES["weights"]

    def writer(self, part: Part, max_bytes: int) -> "Writer":
        """A writer for one of the two files; InvalidAdapterError if that file was written before."""
        return Writer(self.path / FILE_NAMES[part], max_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(OSError):  # what a failing disk does not let go of is swept at the next start
            remove(self.path)


class Writer:
    """Writes one new file and counts its bytes; leaving the `with` block without an error makes it durable.

    Raises AdapterTooLargeError past `max_bytes`, StorageFullError and StorageFailedError.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._name = path.name
        self._max_bytes = max_bytes
        self.num_bytes = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with raising_storage_errors():
            try:
                self._descriptor = os.open(path, flags, mode=0o600)
            except FileExistsError:
                raise InvalidAdapterError([f"{path.name} was sent twice"]) from None

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append all of `chunk`."""
        pause()
        rest = memoryview(chunk).cast("B")
        self.num_bytes += len(rest)
        if self.num_bytes > self._max_bytes:
            raise AdapterTooLargeError(f"{self._name} is larger than {self._max_bytes} bytes")
        with raising_storage_errors():
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with raising_storage_errors():
            try:
                if kind is None:
                    os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)
