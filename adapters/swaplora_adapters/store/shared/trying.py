"""What is common to all that is kept in a shared store: how it fails, calls tried again, objects with a checksum."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from swaplora_adapters.errors import StorageFullError, StoreUnreachableError
from swaplora_adapters.files.disk import StoreError

FORMAT = 2  # that is written; what is of the one before is read as well
PAUSES = (0.05, 0.2)  # seconds between tries, one more than these
T = TypeVar("T")


class DamagedError(StoreUnreachableError):
    """It was read, and is not what was written."""


@contextmanager
def telling(kind: type[Exception], told: Callable[[Any], str]) -> Iterator[None]:
    """Have errors of a `kind` be StoreUnreachableError, in the words of `told` alone; a full disk here is none."""
    try:
        yield
    except (StorageFullError, StoreUnreachableError):
        raise
    except kind as error:
        raise StoreUnreachableError(told(error)) from None


def tried(job: Callable[[], T]) -> T:
    """What `job` returns, which may be done more than once: a store that fails now and then is one that answers."""
    for pause in PAUSES:
        try:
            return job()
        except StoreUnreachableError:
            time.sleep(pause)
    return job()


def encoded(*lines: Mapping[str, Any]) -> bytes:
    """A line of JSON for each, of which the first says the format, and one with the sha256 of all."""
    content = b"\n".join(json.dumps(line).encode() for line in ({"format": FORMAT, **lines[0]}, *lines[1:]))
    return b"%b\n%b\n" % (content, hashlib.sha256(content).hexdigest().encode())


def decoded(raw: bytes, what: str) -> list[dict[str, Any]]:
    """Raises DamagedError, and StoreError for what another release has written."""
    content, _, checksum = raw.removesuffix(b"\n").rpartition(b"\n")
    if checksum != hashlib.sha256(content).hexdigest().encode():
        raise DamagedError(f"{what} in the shared store is damaged: bring it back from a backup")
    lines = [json.loads(line) for line in content.split(b"\n")]
    check_format(lines[0]["format"], what)
    return lines


def check_format(found: int, what: str) -> None:
    """StoreError where this release does not read it."""
    if found > FORMAT:
        raise StoreError(f"{what} in the shared store was written by a newer release: start that one")
    if found < FORMAT - 1:
        raise StoreError(f"{what} in the shared store was written by too old a release: start one between them first")
