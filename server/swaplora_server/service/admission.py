"""How many sequences may be here at once, and all that a request holds from when it was let in until its end."""

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import NamedTuple, Self

from swaplora_adapters.registry.leases import Lease, RequestLeases
from swaplora_adapters.registry.registry import Registry
from swaplora_server.end_rate import EndRate
from swaplora_server.service.errors import RefusedBy, RequestError

UNKNOWN_SECONDS = 10.0  # that a sequence runs, while none has ended that ran beside as many as may run
FOR_LINES, FOR_TENANTS = 1 / 4, 1 / 8  # of all places, so many more for adapters and tenants that hold few


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


class Sharer(NamedTuple):
    """A tenant; of the one that asks without keys, those at one address, or in one network of IPv6."""

    tenant: str
    peer: str

    @classmethod
    def at(cls, tenant: str, peer: str) -> Self:
        """Whoever has an address of IPv6 has all of its /64. Any text that is none stands for itself."""
        return cls(tenant, _network(peer) if peer else "")


@lru_cache(maxsize=1024)  # whoever floods comes again and again
def _network(peer: str) -> str:
    with suppress(ValueError):
        address = ip_address(peer)
        if isinstance(address, IPv6Address):
            return str(address.ipv4_mapped or IPv6Network((int(address), 64), strict=False))
    return peer


class Line(NamedTuple):
    """What a sharer asks for, and what for."""

    sharer: Sharer
    wanted: str


class Admission:
    """One request's part of the sequences that may be here, its leases, and memory for their weights.

    Given back in one place, exactly once, by any thread.
    """

    def __init__(self, leave: Callable[[bool], None]) -> None:
        """`leave` hears whether the request was with the engine."""
        self._leave = leave
        self._leases: list[Lease] = []
        self._request_leases: RequestLeases | None = None
        self._is_released = False

    def hold(self, lease: Lease) -> None:
        """From now on it goes back with the rest."""
        self._leases.append(lease)

    def claim_memory(self, registry: Registry, *, are_routed: bool = False) -> RequestLeases:
        """Ask for the weights of all its leases, in memory together, and for what a mixture makes of them."""
        self._request_leases = registry.lease_weights(self._leases, are_routed=are_routed)
        return self._request_leases

    def release(self, *, has_run: bool = True) -> None:
        """Give back everything; `has_run` is false for a request that failed before it was with the engine.

        Raises RuntimeError the second time: a count that is off would let too many in.
        """
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
            self._leave(has_run)  # last: whom nobody counts holds nothing

    def release_after(self, count: int) -> Callable[[], None]:
        """What each of `count` parts of the request calls once, at its end: the last of them gives everything back."""
        calls = itertools.count(1)
        return lambda: self.release() if next(calls) == count else None


class Admissions:
    """Lets requests in, as many sequences as may run and some that wait. Any thread may ask.

    Half as many may wait as run, and more as long as one more would begin within `max_wait_seconds`, at the rate at
    which others ended lately: a longer queue makes all wait and no more be done. While nothing is known each is taken
    to run for `UNKNOWN_SECONDS`. Never more than `max_waiting`.

    When all these places are taken there are a quarter as many again for those who hold few: a tenant, or one of its
    adapters, may have one there as long as it holds no more than are left (dynamic thresholds, as switches share their
    buffers), or no more than its share of what runs. So whoever floods gets none. An eighth more is for tenants that
    hold few alone: by ever so many adapters nobody takes these from others. Where no key tells who asks, those who ask
    from one address, or from one /64 of IPv6, count as a tenant here: `peer`.
    """

    def __init__(
        self,
        max_waiting: int,
        max_running: int,
        max_wait_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = max_waiting + max_running
        self._max_running = max_running
        self._max_wait_seconds = max_wait_seconds
        self._num_held: Counter[Sharer | Line] = Counter()
        self._num_lines: Counter[Sharer] = Counter()  # of what its requests are for
        self._ends = EndRate(clock)  # of sequences
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

    def num_held(self) -> dict[str, int]:
        """How many sequences of each tenant run or wait."""
        counts: Counter[str] = Counter()
        with self._lock:
            for sharer in self._num_lines:
                counts[sharer.tenant] += self._num_held[sharer]
        return dict(counts)

    @property
    def has_room_for_all(self) -> bool:
        """Whether one more is let in, whoever asks and whatever for."""
        with self._lock:
            return self.num_sequences < self._num_good()

    def check_room(self, tenant: str = "", peer: str = "", wanted: str | None = None) -> None:
        """Raise RequestError where no request of the tenant for `wanted` has room; None is whatever it is for."""
        with self._lock:
            if not self._has_room(1, Sharer.at(tenant, peer), wanted):
                raise self._refusal(RefusedBy.TENANT if wanted is None else RefusedBy.NAMED)

    def admit(self, num_sequences: int, tenant: str = "", wanted: str = "", peer: str = "") -> Admission:
        """Raises RequestError when more would wait than is good, with when it may be worth asking again.

        `wanted` is what the tenant's request is for: an adapter, several, or the base.
        """
        line = Line(Sharer.at(tenant, peer), wanted)
        with self._lock:
            if not self._has_room(num_sequences, line.sharer, wanted):
                raise self._refusal(RefusedBy.NAMED)
            self._count(num_sequences, line)
        return Admission(partial(self._leave, num_sequences, line))

    def _has_room(self, num_sequences: int, sharer: Sharer, wanted: str | None) -> bool:
        """For so many of a sharer; with None, for what it holds none for."""
        here, num_good = self.num_sequences, self._num_good()
        if here < num_good and here + num_sequences <= self._limit:
            return True
        held = self._num_held.get(sharer, 0)
        num_sharers = len(self._num_lines) + (not held)
        if self._is_few(held, num_sequences, num_sharers, FOR_LINES + FOR_TENANTS, num_good):
            return True
        held = 0 if wanted is None else self._num_held.get(Line(sharer, wanted), 0)
        num_lines = self._num_lines[sharer] + (not held)
        return self._is_few(held, num_sequences, num_sharers * num_lines, FOR_LINES, num_good)

    def _is_few(self, held: int, more: int, num_sharers: int, part: float, num_good: int) -> bool:
        """Whether who holds so many may have more, of the part beyond all places that is for those who hold few."""
        num_left = math.floor(num_good * (1 + part)) - self.num_sequences
        few = max(num_left, self._max_running // num_sharers, 1)
        return held + more <= few and self.num_sequences + more <= math.floor(self._limit * (1 + part))

    def _num_good(self) -> int:
        """How many may be here of those who hold many."""
        if self._max_wait_seconds is None:
            return self._limit
        rate = self._ends.per_second()
        num_in_time = self._max_wait_seconds * (self._max_running / UNKNOWN_SECONDS if rate is None else rate)
        return min(self._limit, self._max_running + math.ceil(max(self._max_running / 2, num_in_time)))

    def _refusal(self, by: RefusedBy) -> RequestError:
        seconds = self._ends.retry_seconds(max(0, self.num_sequences - self._max_running))
        message = f"too many requests are waiting; try again in {seconds} s"
        return RequestError("overloaded", message, retry_seconds=seconds, by=by)

    def _leave(self, num_sequences: int, line: Line, has_run: bool) -> None:
        with self._lock:
            if self.num_sequences <= self._max_running:  # then ends come as fast as requests do, and not as they could
                self._ends.forget()
            elif has_run:
                self._ends.note(num_sequences)
            self._count(-num_sequences, line)

    def _count(self, num_sequences: int, line: Line) -> None:
        self.num_sequences += num_sequences
        if self.num_sequences > self._max_running:
            self._ends.begin()
        was_here = line in self._num_held
        for holder in (line.sharer, line):
            self._num_held[holder] += num_sequences
            if not self._num_held[holder]:
                del self._num_held[holder]
        self._num_lines[line.sharer] += (line in self._num_held) - was_here
        if not self._num_lines[line.sharer]:
            del self._num_lines[line.sharer]
