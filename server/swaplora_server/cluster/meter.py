"""Limits by the minute and by concurrency, counted for all replicas together in one place: an actor of Ray."""

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from swaplora_server.access.limits import LimitReachedError, Limits, Meter, OwnMeter, Reservation

INTERFACE = 2  # of CommonMeter: one more with each change of what it can be told, or answers
SILENT_SECONDS = 30.0  # after which a replica counts as gone, and what it had begun as ended
START_SECONDS = 10.0  # that the actor may take to be there, while nobody is served yet
_ASK_SECONDS = 1.0  # that a request waits for it
_REST_SECONDS = 1.0  # after it was late, in which it is not asked
_AT_ONCE = ("requests_per_minute", "changes_per_minute", "concurrent_requests")


class Reached(NamedTuple):
    """What `LimitReachedError` says, as an answer."""

    message: str
    retry_seconds: int | None


class _Counted:
    """One that a client asked: counted once, however many replicas have it, and until none has."""

    def __init__(self, reached: Reached | None, end: Callable[[], None]) -> None:
        self.reached = reached
        self.num_running = 0
        self._end = end

    def ended(self) -> None:
        """By one replica."""
        self.num_running -= 1
        if not self.num_running:
            self._end()


class _Reserved(NamedTuple):
    replica: str
    counted_as: str | None
    reservation: Reservation


class CommonMeter:
    """The counts. One caller at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._meter = Meter(clock)
        self._begun: dict[str, tuple[str, str]] = {}  # the replica that is to end it, and what it is counted as
        self._counted: dict[str, _Counted] = {}  # what runs, and lately did
        self._over: dict[str, float] = {}  # what of that no replica has, by when that came about; the first one first
        self._reserved: dict[str, _Reserved] = {}
        self._seen: dict[str, float] = {}

    def begin(
        self, replica: str, request: str, limited: dict[str, Limits], is_change: bool, counted_as: str | None = None
    ) -> Reached | None:
        """See `Meter.begin`. What was counted lately as the same is let in or refused as it was then.

        Where no replica has it any more it is asked again: it takes nothing of the minute's, and runs at once as any.
        """
        self.alive(replica)
        self._forget_lost()
        name = counted_as or request
        counted = self._counted.get(name)
        if counted is None:
            counted = self._count(limited, is_change)
        elif counted.reached is None and not counted.num_running:
            counted = self._count(_at_once(limited), is_change)
        self._counted[name] = counted
        self._over.pop(name, None)
        if counted.reached is None:
            counted.num_running += 1
            self._begun[request] = replica, name
        else:
            self._over[name] = self._clock()
        return counted.reached

    def _count(self, limited: dict[str, Limits], is_change: bool) -> _Counted:
        try:
            return _Counted(None, self._meter.begin(limited, is_change=is_change))
        except LimitReachedError as error:
            return _Counted(Reached(str(error), error.retry_seconds), lambda: None)

    def end(self, request: str) -> None:
        """Count it out."""
        _, name = self._begun.pop(request, ("", None))
        if name is not None:
            self._counted[name].ended()
            if not self._counted[name].num_running:
                self._over[name] = self._clock()

    def reserve(
        self, replica: str, tokens: str, limited: dict[str, Limits], num_tokens: int, counted_as: str | None = None
    ) -> Reached | None:
        """See `Meter.reserve`. Takes over what another replica holds for the same."""
        self.alive(replica)
        if counted_as is not None:
            self._let_go(replica, counted_as)
        try:
            self._reserved[tokens] = _Reserved(replica, counted_as, self._meter.reserve(limited, num_tokens))
        except LimitReachedError as error:
            return Reached(str(error), error.retry_seconds)
        return None

    def _let_go(self, replica: str, counted_as: str) -> None:
        """One for one: a replica may reserve several times for a request."""
        for tokens, held in self._reserved.items():
            if held.counted_as == counted_as and held.replica != replica:
                return self.settle(tokens, 0)

    def settle(self, tokens: str, used: int) -> None:
        """See `Reservation.settle`."""
        held = self._reserved.pop(tokens, None)
        if held is not None:
            held.reservation.settle(used)

    def alive(self, replica: str) -> None:
        """A replica is there, and what it began runs on."""
        self._seen[replica] = self._clock()

    def _forget_lost(self) -> None:
        """End what replicas had begun that are gone; what they had reserved counts as used."""
        earliest = self._clock() - SILENT_SECONDS
        while self._over and next(iter(self._over.values())) < earliest:
            name = next(iter(self._over))
            del self._over[name], self._counted[name]
        for lost in [replica for replica, seen in self._seen.items() if seen < earliest]:
            del self._seen[lost]
            for request in [request for request, (replica, _) in self._begun.items() if replica == lost]:
                self.end(request)
            self._reserved = {tokens: held for tokens, held in self._reserved.items() if held.replica != lost}


class SharedMeter(OwnMeter):
    """A replica's: those whom nothing limits are counted nowhere, the others by the actor.

    A request waits for it the millisecond or two, and nothing else does. Where it does not answer, nobody is let in
    whom something limits, and for a while it is not asked again. Belongs to the event loop.
    """

    def __init__(self, replica: str, actor: Callable[[], Any], clock: Callable[[], float] = time.monotonic) -> None:
        """`actor` finds the handle of the one CommonMeter, and may take its time."""
        super().__init__()
        self._replica = replica
        self._find = actor
        self._now = clock
        self._actor: Any = None  # kept when it does not answer: what it may still count in is to be counted out by it
        self._looking: asyncio.Future[Any] | None = None
        self._is_answering = False
        self._rests_until = -math.inf

    async def prepare(self) -> None:
        """Wait until it is there, or too late: before the first request."""
        with suppress(LimitReachedError):
            await self._ask("alive", self._replica, seconds=START_SECONDS)

    async def begin(
        self, limited: dict[str, Limits], *, is_change: bool, counted_as: str | None = None
    ) -> Callable[[], None]:
        """See `OwnMeter.begin`."""
        own = _counted(limited)
        if not own:
            return await super().begin(limited, is_change=is_change)
        request = uuid.uuid4().hex
        end = partial(self._tell, "end", request)
        await self._ask("begin", self._replica, request, own, is_change, counted_as, undo=end)
        return _Once(end)

    async def reserve(self, limited: dict[str, Limits], num_tokens: int, counted_as: str | None = None) -> Reservation:
        """See `OwnMeter.reserve`."""
        own = {whose: limits for whose, limits in limited.items() if limits.tokens_per_minute is not None}
        if not own:
            return await super().reserve(limited, num_tokens)
        tokens = uuid.uuid4().hex
        settle = partial(self._tell, "settle", tokens)
        await self._ask("reserve", self._replica, tokens, own, num_tokens, counted_as, undo=partial(settle, 0))
        return Reservation(num_tokens, settle)

    def tell_alive(self) -> None:
        """To be called more often than every SILENT_SECONDS."""
        if self._actor is not None:
            self._tell("alive", self._replica)

    async def _ask(
        self, what: str, *args: Any, undo: Callable[[], None] = lambda: None, seconds: float = _ASK_SECONDS
    ) -> None:
        """Raises LimitReachedError; `undo` is for what it does, perhaps, for who waits no more. It does all in turn."""
        if self._now() < self._rests_until:
            raise _cannot_count()
        try:
            async with asyncio.timeout(seconds):
                reached: Reached | None = await getattr(await self._found(), what).remote(*args)
            self._is_answering = True
        except Exception as error:
            self._is_answering = False  # the next one may find another
            self._rests_until = self._now() + _REST_SECONDS
            undo()
            raise _cannot_count() from error
        except asyncio.CancelledError:
            undo()
            raise
        if reached is not None:
            raise LimitReachedError(reached.message, reached.retry_seconds)

    async def _found(self) -> Any:
        """The actor. It is looked for by one thread at a time, however many wait, or do not any more."""
        if not self._is_answering:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.ensure_future(asyncio.to_thread(self._find))
            self._actor = await asyncio.shield(self._looking)
        return self._actor

    def _tell(self, what: str, *args: Any) -> None:
        if self._actor is not None:
            getattr(self._actor, what).remote(*args)


def _cannot_count() -> LimitReachedError:
    return LimitReachedError("what this key may ask for cannot be counted now; try again in 1 s", 1)


class _Once:
    """Calls it once, however often it is called."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end: Callable[[], None] | None = end

    def __call__(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end()


def _counted(limited: dict[str, Limits]) -> dict[str, Limits]:
    """Those whom something limits that is counted where a request begins."""

    def is_counted(limits: Limits) -> bool:
        return any(getattr(limits, kind) is not None for kind in _AT_ONCE)

    return {whose: limits for whose, limits in limited.items() if is_counted(limits)}


def _at_once(limited: dict[str, Limits]) -> dict[str, Limits]:
    """The limits on concurrency alone."""
    return {whose: Limits(concurrent_requests=limits.concurrent_requests) for whose, limits in limited.items()}
