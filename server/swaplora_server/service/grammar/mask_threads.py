"""Where masks are computed: mostly on the engine's thread, which has so much time for it and no more."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from functools import cached_property

from llguidance import LLExecutor, LLMatcher, LLTokenizer

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

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._has_changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._num_idle = 0
        self._is_closed = False

    def do(self, seconds: float, job: Callable[[], None]) -> None:
        """Have `job` done, which took so long the last time, and raises nothing."""
        with self._has_changed:
            heapq.heappush(self._waiting, (seconds, next(self._numbers), job))
            if not self._num_idle and len(self._threads) < NUM_THREADS and not self._is_closed:
                thread = threading.Thread(target=self._loop, name="mask", daemon=True)
                thread.start()
                self._threads.append(thread)
            self._has_changed.notify()

    def consume(self, matcher: LLMatcher, token_id: int) -> bool:
        """Whether `matcher` took the token. For these threads alone: others have the interpreter in the meantime.

        llguidance lets go of it for two matchers and not for one: so beside this one goes another, which takes nothing.
        """
        nothing = LLMatcher(self._tokenizer, "", log_level=0)
        is_consumed, _ = self._executor.consume_token_par([(matcher, token_id), (nothing, 0)])
        return is_consumed

    @cached_property
    def _executor(self) -> LLExecutor:
        """Its threads are as low in priority as the one that asks for it first."""
        return LLExecutor(NUM_THREADS)

    def close(self, seconds: float) -> None:
        """End the threads, each after the job that it has begun, and wait so long for them. What waits is not done."""
        until = time.monotonic() + seconds
        with self._has_changed:
            self._is_closed = True
            self._has_changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self.__dict__.pop("_executor", None)  # and its threads with it

    def _loop(self) -> None:
        lower_priority()
        while (job := self._next()) is not None:
            job()

    def _next(self) -> Callable[[], None] | None:
        with self._has_changed:
            self._num_idle += 1
            self._has_changed.wait_for(lambda: self._waiting or self._is_closed)
            self._num_idle -= 1
            return None if self._is_closed else heapq.heappop(self._waiting)[-1]
