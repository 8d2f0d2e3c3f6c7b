"""What a shared store is made of: objects by key, of which one can be made only if it is not there."""

from pathlib import Path
from typing import NamedTuple, Protocol


class Listed(NamedTuple):
    """An object that is there."""

    key: str
    age: float  # in seconds, since it was last written


class Objects(Protocol):
    """Any thread may call. Each raises StoreUnreachableError where it cannot be known whether it was done.

    What is written is durable when a call returns, and is seen whole by all, or not at all.
    """

    def get(self, key: str) -> bytes | None:
        """None for what is not there."""

    def create(self, key: str, content: bytes) -> bool:
        """Make an object if there is none; whether there was none."""

    def put(self, key: str, path: Path) -> None:
        """Make an object of a file, over what is there."""

    def fetch(self, key: str, path: Path) -> bool:
        """Write an object to a new file; whether there is such an object."""

    def under(self, prefix: str) -> list[Listed]:
        """All whose keys begin so, in order of key."""

    def remove(self, key: str) -> None:
        """Harmless for what is not there."""
