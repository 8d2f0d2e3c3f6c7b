"""How fast things end, by those that did lately, and so when it may be worth asking again."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable

RATE_SECONDS = 30.0
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1, 60


class EndRate:
    """How fast things end, by those that did in the last `seconds`. Thread-safe.

    The time counts from the first of them, or from `begin`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, seconds: float = RATE_SECONDS) -> None:
        self._clock = clock
        self._seconds = seconds
        self._ends: deque[tuple[float, int]] = deque()  # when, and how many
        self._num_ends = 0
        self._since: float | None = None  # when `begin` was called
        self._lock = threading.Lock()

    def note(self, count: int = 1) -> None:
        """So many have just ended."""
        with self._lock:
            self._ends.append((self._clock(), count))
            self._num_ends += count
            self._forget_old()

    def begin(self) -> None:
        """The time counts from now on, if it did not since `forget`: until the first end as well."""
        with self._lock:
            if self._since is None:
                self._since = self._clock()

    def forget(self) -> None:
        """Nothing is known any more."""
        with self._lock:
            self._ends.clear()
            self._num_ends = 0
            self._since = None

    def per_second(self) -> float | None:
        """None where none has ended."""
        with self._lock:
            self._forget_old()
            if not self._ends:
                return None
            now = self._clock()
            since = self._ends[0][0] if self._since is None else max(self._since, now - self._seconds)
            return self._num_ends / max(now - since, MIN_RETRY_SECONDS)

    def retry_seconds(self, count: int, unknown: int = MIN_RETRY_SECONDS) -> int:
        """When it may be worth asking again: once so many more have ended; `unknown` where none has lately."""
        rate = self.per_second()
        if rate is None:
            return unknown
        return min(max(math.ceil(count / rate), MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

    def _forget_old(self) -> None:
        """Needs the lock."""
        while self._ends and self._ends[0][0] < self._clock() - self._seconds:
            self._num_ends -= self._ends.popleft()[1]
