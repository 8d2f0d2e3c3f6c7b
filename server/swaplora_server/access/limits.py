"""How much a key, and all keys of a tenant together, may ask for; and the counts that see to it."""

import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

WINDOW_SECONDS = 60.0
CONCURRENCY_RETRY_SECONDS = 1
Count = Annotated[int, Field(ge=0, le=10**12)]


class Limits(BaseModel):
    """What a key may ask for; None is as much as it likes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    requests_per_minute: Count | None = None
    changes_per_minute: Count | None = None  # requests that need adapters:write
    tokens_per_minute: Count | None = None  # of prompts and answers
    concurrent_requests: Count | None = None


class TenantLimits(Limits):
    """What all keys of a tenant may ask for together, and have."""

    adapters: Count | None = None
    adapter_bytes: Count | None = None  # of the files of all versions
    pinned_bytes: Count | None = None  # of memory; None is a part of what tenants may pin together


NO_LIMITS = TenantLimits()


class LimitReachedError(Exception):
    """One more is too many now. `retry_seconds` is when it may not be; None is never."""

    def __init__(self, message: str, retry_seconds: int | None) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


@dataclass(slots=True)
class _Entry:
    at: float
    amount: int


@dataclass(slots=True)
class _Window:
    """What was taken in the last minute, to the moment: no minute, wherever it begins, has more than the limit."""

    entries: deque[_Entry] = field(default_factory=deque)
    total: int = 0

    def wait(self, amount: int, limit: int, now: float) -> float:
        """Seconds until `amount` may be taken; inf for more than a whole minute has."""
        while self.entries and self.entries[0].at <= now - WINDOW_SECONDS:
            self.total -= self.entries.popleft().amount
        excess = self.total + amount - limit
        if excess <= 0:
            return 0.0
        for entry in self.entries:
            excess -= entry.amount
            if excess <= 0:
                return entry.at + WINDOW_SECONDS - now
        return math.inf

    def take(self, amount: int, now: float) -> _Entry:
        self.entries.append(_Entry(now, amount))
        self.total += amount
        return self.entries[-1]


class Taking(NamedTuple):
    """What is to be taken of one limit of one key or tenant."""

    whose: str
    kind: str
    amount: int
    limit: int


class Reservation:
    """Tokens that a request may come to; what it does not need goes back at its end."""

    def __init__(self, amount: int, settle: Callable[[int], None] = lambda _used: None) -> None:
        self._amount = amount
        self._settle = settle
        self._is_settled = False

    def settle(self, used: int) -> None:
        """Once; harmless after that."""
        if not self._is_settled:
            self._is_settled = True
            self._settle(min(used, self._amount))


NOTHING = Reservation(0)


class Meter:
    """Counts for everybody. Any thread may ask; what is asked for is taken from all limits at once, or from none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: defaultdict[tuple[str, str], _Window] = defaultdict(_Window)
        self._running: Counter[str] = Counter()

    def begin(self, limited: dict[str, Limits], *, is_change: bool) -> Callable[[], None]:
        """Count a request in, of all whom `limited` names; what is returned counts it out, once however often called.

        Raises LimitReachedError.
        """
        counted = [whose for whose, limits in limited.items() if limits.concurrent_requests is not None]
        with self._lock:
            self._check_running(limited)
            self._take(_of_a_request(limited, is_change=is_change))
            self._running.update(counted)
        return partial(self._end, counted)

    def check(self, limited: dict[str, Limits], *, is_change: bool) -> None:
        """Raise what `begin` would raise, and count nothing."""
        with self._lock:
            self._check_running(limited)
            self._check(_of_a_request(limited, is_change=is_change), self._clock())

    def reserve(self, limited: dict[str, Limits], num_tokens: int) -> Reservation:
        """Take the tokens that a request may come to. Raises LimitReachedError."""
        takings = [*_takings(limited, "tokens", num_tokens)]
        if not takings:
            return Reservation(num_tokens)
        with self._lock:
            taken = self._take(takings)
        return Reservation(num_tokens, lambda used: self._give_back(taken, num_tokens - used))

    def _check_running(self, limited: dict[str, Limits]) -> None:
        """Needs `_lock`."""
        for whose, limits in limited.items():
            most = limits.concurrent_requests
            if most is not None and self._running[whose] >= most:
                message = f"{whose} may have {most} requests at once; try again when one has ended"
                raise LimitReachedError(message, CONCURRENCY_RETRY_SECONDS)

    def _take(self, takings: list[Taking]) -> list[tuple[_Window, _Entry]]:
        """Needs `_lock`."""
        now = self._clock()
        self._check(takings, now)
        windows = [(self._windows[whose, kind], amount) for whose, kind, amount, _ in takings]
        return [(window, window.take(amount, now)) for window, amount in windows]

    def _check(self, takings: list[Taking], now: float) -> None:
        """Needs `_lock`."""
        for whose, kind, amount, limit in takings:
            wait = self._windows[whose, kind].wait(amount, limit, now)
            if wait == math.inf:
                raise LimitReachedError(f"{whose} has {limit} {kind} a minute, and this may come to {amount}", None)
            if wait:
                seconds = math.ceil(wait)
                raise LimitReachedError(f"{whose} has {limit} {kind} a minute; try again in {seconds} s", seconds)

    def _give_back(self, taken: list[tuple[_Window, _Entry]], amount: int) -> None:
        with self._lock:
            for window, entry in taken:
                if window.entries and entry.at >= window.entries[0].at:  # else it has left the window already
                    window.total -= amount
                entry.amount -= amount

    def _end(self, counted: list[str]) -> None:
        with self._lock:
            self._running.subtract(counted)
            counted.clear()


class OwnMeter:
    """The counts of a server alone, asked as those of several are: by a coroutine, on the event loop."""

    def __init__(self) -> None:
        self.counts = Meter()

    async def begin(
        self, limited: dict[str, Limits], *, is_change: bool, counted_as: str | None = None
    ) -> Callable[[], None]:
        """See `Meter.begin`. What several servers are asked as one is counted once, by this name; here there is one."""
        return self.counts.begin(limited, is_change=is_change)

    async def reserve(self, limited: dict[str, Limits], num_tokens: int, counted_as: str | None = None) -> Reservation:
        """See `Meter.reserve`, and `begin` for the name."""
        return self.counts.reserve(limited, num_tokens)


def _of_a_request(limited: dict[str, Limits], *, is_change: bool) -> list[Taking]:
    return [*_takings(limited, "requests", 1), *(_takings(limited, "changes", 1) if is_change else ())]


def _takings(limited: dict[str, Limits], kind: str, amount: int) -> Iterator[Taking]:
    for whose, limits in limited.items():
        limit = getattr(limits, f"{kind}_per_minute")
        if limit is not None:
            yield Taking(whose, kind, amount, limit)
