"""How many sequences may be here at once, and all that a request holds from when it was let in until its end."""

import itertools
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

from swaplora_adapters.registry.leases import Lease, RequestLeases
from swaplora_adapters.registry.registry import Registry
from swaplora_server.service.errors import RequestError

RATE_SECONDS = 30.0
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1, 60


class Urgency(NamedTuple):
    """How soon a request is to be done: its `priority` among its tenant's own, of which the lower goes first.

    With a `timeout`, in seconds, all of it is wanted by then, or nothing.
    """

    priority: int = 0
    timeout: float | None = None

    def deadline(self, began: float) -> float | None:
        """When it has to be done, if it was asked for at `began`, on the monotonic clock."""
        return None if self.timeout is None else began + self.timeout


NO_HURRY = Urgency()


class Admission:
    """One request's part of the sequences that may be here, its leases, and memory for their weights.

    Given back in one place, exactly once, by any thread.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self._leases: list[Lease] = []
        self._request_leases: RequestLeases | None = None
        self._is_released = False

    def hold(self, lease: Lease) -> None:
        """From now on it goes back with the rest."""
        self._leases.append(lease)

    def claim_memory(self, registry: Registry) -> RequestLeases:
        """Ask for the weights of all its leases, in memory together."""
        self._request_leases = registry.lease_weights(self._leases)
        return self._request_leases

    def release(self) -> None:
        """Give back everything. Raises RuntimeError the second time: a count that is off would let too many in."""
        if self._is_released:
            raise RuntimeError("an admission was given back twice")
        self._is_released = True
        try:
            if self._request_leases is not None:
                self._request_leases.release()
            else:
                for lease in self._leases:
                    lease.release()
        finally:
            self._leave()  # last: whom nobody counts holds nothing

    def release_after(self, count: int) -> Callable[[], None]:
        """What each of `count` parts of the request calls once, at its end: the last of them gives everything back."""
        calls = itertools.count(1)
        return lambda: self.release() if next(calls) == count else None


class Admissions:
    """Lets requests in, no more than so many sequences at once. Any thread may ask.

    When all places are taken there are a quarter as many again for those who hold few: a tenant, or where one tenant
    holds all of them an adapter, may have one there as long as it holds no more than are left. So whoever floods gets
    none of them, and of several who come none gets the last (dynamic thresholds, as switches share their buffers).
    """

    def __init__(self, max_waiting: int, max_running: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = max_waiting + max_running
        self._most = self._limit + self._limit // 4
        self._max_running = max_running
        self._clock = clock
        self._num_held: Counter[Hashable] = Counter()  # by tenant, and by tenant and what its requests are for
        self._ends: deque[tuple[float, int]] = deque()  # of the last seconds: when, and how many sequences
        self.num_sequences = 0  # of requests that were let in and have not given everything back
        self._lock = threading.Lock()

    def check_number(self, n: int, num_prompts: int) -> None:
        """Raise RequestError for more sequences than can ever be here at once."""
        if n * num_prompts > self._limit:
            message = (
                f"n times the prompts is {n * num_prompts}; this server takes at most {self._limit} at once, "
                "--max-num-seqs and --max-waiting together"
            )
            raise RequestError("invalid_request", message, "n" if n > 1 else "prompt")

    def admit(self, num_sequences: int, tenant: str = "", wanted: str = "") -> Admission:
        """Raises RequestError when more would wait than the operator allows, with when it may be worth asking again.

        `wanted` is what the tenant's request is for: an adapter, several, or the base.
        """
        sharers = (tenant, (tenant, wanted))
        with self._lock:
            if not self._has_room(num_sequences, *sharers):
                message, seconds = "too many requests are waiting", self._seconds_to_begin()
                raise RequestError("overloaded", f"{message}; try again in {seconds} s", retry_seconds=seconds)
            self._count(num_sequences, sharers)
        return Admission(partial(self._leave, num_sequences, sharers))

    def _has_room(self, num_sequences: int, tenant: Hashable, line: Hashable) -> bool:
        if self.num_sequences + num_sequences <= self._limit:
            return True
        is_alone = self._num_held[tenant] == self.num_sequences
        num_held = self._num_held[line if is_alone else tenant]
        return num_held + num_sequences <= self._most - self.num_sequences

    def _seconds_to_begin(self) -> int:
        """Until those who wait now will have begun, at the rate at which others ended in the last seconds."""
        now = self._clock()
        self._forget(now)
        if not self._ends:
            return MIN_RETRY_SECONDS
        seconds = max(now - self._ends[0][0], MIN_RETRY_SECONDS)
        rate = sum(count for _, count in self._ends) / seconds
        num_waiting = max(0, self.num_sequences - self._max_running)
        return min(max(math.ceil(num_waiting / rate), MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

    def _leave(self, num_sequences: int, sharers: tuple[Hashable, ...]) -> None:
        with self._lock:
            self._count(-num_sequences, sharers)
            now = self._clock()
            self._ends.append((now, num_sequences))
            self._forget(now)

    def _count(self, num_sequences: int, sharers: tuple[Hashable, ...]) -> None:
        self.num_sequences += num_sequences
        for sharer in sharers:
            self._num_held[sharer] += num_sequences
            if not self._num_held[sharer]:
                del self._num_held[sharer]

    def _forget(self, now: float) -> None:
        while self._ends and self._ends[0][0] < now - RATE_SECONDS:
            self._ends.popleft()
