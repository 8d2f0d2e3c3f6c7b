"""Where masks are computed: mostly on the engine's thread, which has so much time for it and no more."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from swaplora_adapters.priority import lower_priority

SLOW_SECONDS = 0.001  # a mask that took this long is computed off the engine's thread the next time
_BURST_SECONDS = 0.008
_SHARE = 0.5  # of the time that passes
NUM_THREADS = 2


class Allowance:
    """Time that a thread may spend on something: half of what passes, and a few milliseconds at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left, self._seen_at = _BURST_SECONDS, clock()

    @property
    def is_left(self) -> bool:
        now = self._clock()
        self._left = min(_BURST_SECONDS, self._left + _SHARE * (now - self._seen_at))
        self._seen_at = now
        return self._left > 0

    def spend(self, seconds: float) -> None:
        self._left -= seconds


class MaskThreads:
    """Does what takes long, the shortest first by what it took before. Daemons of low priority, begun when needed."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._has_changed = threading.Condition()
        self._num_threads = self._num_idle = 0

    def do(self, seconds: float, job: Callable[[], None]) -> None:
        """Have `job` done, which took so long the last time, and raises nothing."""
        with self._has_changed:
            heapq.heappush(self._waiting, (seconds, next(self._numbers), job))
            if not self._num_idle and self._num_threads < NUM_THREADS:
                threading.Thread(target=self._loop, name="mask", daemon=True).start()
                self._num_threads += 1
            self._has_changed.notify()

    def _loop(self) -> None:
        lower_priority()
        while True:
            self._next()()

    def _next(self) -> Callable[[], None]:
        with self._has_changed:
            self._num_idle += 1
            self._has_changed.wait_for(lambda: self._waiting)
            self._num_idle -= 1
            return heapq.heappop(self._waiting)[-1]
