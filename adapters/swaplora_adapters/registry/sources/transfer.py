"""What every source shares: bytes counted into the staging folder, and another try where one may help."""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from swaplora_adapters.artifact.names import WEIGHTS_FILE
from swaplora_adapters.artifact.staging import FILE_NAMES, Part, Staging
from swaplora_adapters.errors import AdapterTooLargeError, SourceFailedError, SourceNotFoundError

CHUNK_BYTES = 1 << 20
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
BACKOFF_SECONDS = (0.5, 2.0)  # before the second try and the third
NUM_TRIES = 1 + len(BACKOFF_SECONDS)
Result = TypeVar("Result")


class PassingError(Exception):
    """What another try may mend; says at which step it came up, and why."""


def try_again(attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns, in `NUM_TRIES` tries at most. Raises SourceFailedError after the last."""
    for seconds in BACKOFF_SECONDS:
        try:
            return attempt()
        except PassingError:
            time.sleep(seconds)
    try:
        return attempt()
    except PassingError as error:
        raise SourceFailedError(f"{error} after {NUM_TRIES} tries") from None


def receive(chunks: Iterable[bytes], staging: Staging, part: Part, max_bytes: int, step: str) -> None:
    """Write one file anew, whatever an earlier try left of it. Raises AdapterTooLargeError and StorageFullError."""
    (staging.path / FILE_NAMES[part]).unlink(missing_ok=True)
    with staging.writer(part, max_bytes) as writer:
        for chunk in chunks:
            try:
                writer.write(chunk)
            except AdapterTooLargeError as error:
                raise AdapterTooLargeError(f"{step}: {error}") from None


def missing(step: str, part: Part) -> SourceNotFoundError:
    """That the source lacks one of the two files."""
    hint = "" if part == "config" else f"; weights are read from {WEIGHTS_FILE} only, never from adapter_model.bin"
    return SourceNotFoundError(f"{step}: there is no such file{hint}")


def reading(source: object, part: Part) -> str:
    """What the step is called in which one file is read."""
    return f"{source}: reading {FILE_NAMES[part]}"
