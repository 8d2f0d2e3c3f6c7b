"""What every source shares: time kept, bytes counted into the staging folder, another try where one may help."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.errors import AdapterTooLargeError, SourceFailedError, SourceNotFoundError, StoppingError
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_adapters.store.staging import FILE_NAMES, Part, Staging

CHUNK_BYTES = 1 << 20
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
FETCH_SECONDS = 600.0  # for all of it, so that a host that sends a byte now and then is let go of
BACKOFF_SECONDS = (0.5, 2.0)  # before the second try and the third
NUM_TRIES = 1 + len(BACKOFF_SECONDS)
Result = TypeVar("Result")


class TransientError(Exception):
    """What another try may mend; says at which step it came up, and why."""


class Deadline:
    """When a fetch has to have ended: `FETCH_SECONDS` after it began, when the server stops, or nobody waits for it."""

    def __init__(self, is_stopping: threading.Event, cancellation: Cancellation) -> None:
        self._is_stopping = is_stopping
        self._cancellation = cancellation
        self._end = time.monotonic() + FETCH_SECONDS

    def check(self, step: object) -> None:
        """Raise SourceFailedError or StoppingError if that is now, WorkCancelledError if nobody waits for it."""
        self._cancellation.check()
        if self._is_stopping.is_set():
            raise StoppingError(step)
        if time.monotonic() > self._end:
            raise SourceFailedError(f"{step}: not done after {FETCH_SECONDS:g} seconds")

    def over(self, chunks: Iterable[bytes], step: str) -> Iterator[bytes]:
        """The chunks, as long as there is time."""
        for chunk in chunks:
            self.check(step)
            yield chunk

    def pause(self, seconds: float) -> None:
        """Sleep, but not into the server's stop."""
        self._is_stopping.wait(seconds)


def with_retries(attempt: Callable[[], Result], deadline: Deadline) -> Result:
    """What `attempt` returns, in `NUM_TRIES` tries at most. Raises SourceFailedError after the last."""
    for seconds in BACKOFF_SECONDS:
        try:
            return attempt()
        except TransientError as error:
            deadline.pause(seconds)
            deadline.check(error)
    try:
        return attempt()
    except TransientError as error:
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
