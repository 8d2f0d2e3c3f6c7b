"""Objects of which it is known whether they are asked in vain: since when a call waits, and when one was answered."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from swaplora_adapters.store.shared.objects import Listed, Objects

LONG_SECONDS = 30.0  # that lists, and objects that are large, may well take
T = TypeVar("T")


class HeardObjects:
    """See `Objects`. Calls count of objects by key, and lists: no files, which may take as long as they will."""

    def __init__(self, objects: Objects, *, are_large: bool = False) -> None:
        """Objects that `are_large` are waited for as lists are."""
        self._objects, self._are_large = objects, are_large
        self._asked: dict[object, float] = {}  # by call that waits: since when it is late, on the monotonic clock
        self._others = set[object]()  # calls that wait, and may take as long as they will
        self.heard_at = 0.0  # when the last one was answered

    @property
    def asked_at(self) -> float | None:
        """Since when the one waits that waits longest, but for the time that it may well take."""
        return min([*self._asked.values()], default=None)

    @property
    def is_awaited(self) -> bool:
        """Whether any call waits."""
        return bool(self._asked or self._others)

    def get(self, key: str) -> bytes | None:
        return self._heard(lambda: self._objects.get(key), LONG_SECONDS if self._are_large else 0.0)

    def create(self, key: str, content: bytes) -> bool:
        return self._heard(lambda: self._objects.create(key, content), LONG_SECONDS if self._are_large else 0.0)

    def put(self, key: str, path: Path) -> None:
        self._awaited(lambda: self._objects.put(key, path))

    def fetch(self, key: str, path: Path) -> bool:
        return self._awaited(lambda: self._objects.fetch(key, path))

    def under(self, prefix: str) -> list[Listed]:
        return self._heard(lambda: self._objects.under(prefix), LONG_SECONDS)

    def remove(self, key: str) -> None:
        self._awaited(lambda: self._objects.remove(key))

    def _heard(self, call: Callable[[], T], seconds: float) -> T:
        this = object()
        self._asked[this] = time.monotonic() + seconds
        try:
            answer = call()
            self.heard_at = time.monotonic()
            return answer
        finally:
            del self._asked[this]

    def _awaited(self, call: Callable[[], T]) -> T:
        this = object()
        self._others.add(this)
        try:
            return call()
        finally:
            self._others.discard(this)
