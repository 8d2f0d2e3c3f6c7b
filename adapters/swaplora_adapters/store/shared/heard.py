"""Objects of which it is known whether they are asked in vain: since when a call waits, and when one was answered."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from swaplora_adapters.store.shared.objects import Listed, Objects

T = TypeVar("T")


class HeardObjects:
    """See `Objects`. Calls count that are short wherever the store is well: of small objects by key."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._asked: dict[object, float] = {}  # by call that waits: since when, on the monotonic clock
        self.heard_at = 0.0  # when the last one was answered

    @property
    def asked_at(self) -> float | None:
        """Since when the one waits that waits longest."""
        return min([*self._asked.values()], default=None)

    def get(self, key: str) -> bytes | None:
        return self._heard(lambda: self._objects.get(key))

    def create(self, key: str, content: bytes) -> bool:
        return self._heard(lambda: self._objects.create(key, content))

    def put(self, key: str, path: Path) -> None:
        self._objects.put(key, path)

    def fetch(self, key: str, path: Path) -> bool:
        return self._objects.fetch(key, path)

    def under(self, prefix: str) -> list[Listed]:
        return self._objects.under(prefix)

    def remove(self, key: str) -> None:
        self._objects.remove(key)

    def _heard(self, call: Callable[[], T]) -> T:
        this = object()
        self._asked[this] = time.monotonic()
        try:
            answer = call()
            self.heard_at = time.monotonic()
            return answer
        finally:
            del self._asked[this]
