"""What is common to all that is kept in a shared store: calls are tried again, and objects carry a checksum."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from swaplora_adapters.errors import StoreUnreachableError
from swaplora_adapters.files.disk import StoreError

FORMAT = 1
PAUSES = (0.05, 0.2)  # seconds between tries, one more than these
T = TypeVar("T")


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
    """StoreUnreachableError for what is damaged, StoreError for what a newer release has written."""
    content, _, checksum = raw.removesuffix(b"\n").rpartition(b"\n")
    if checksum != hashlib.sha256(content).hexdigest().encode():
        raise StoreUnreachableError(f"{what} in the shared store is damaged: bring it back from a backup")
    lines = [json.loads(line) for line in content.split(b"\n")]
    if lines[0]["format"] > FORMAT:
        raise StoreError(f"{what} in the shared store was written by a newer release: start that one")
    return lines
