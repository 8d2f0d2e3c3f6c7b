"""All connections of a server: how many there may be, how long each may wait, and which goes when there is no room."""

import asyncio
import resource
import time
from collections import OrderedDict
from typing import Protocol

from swaplora_server.config import Settings

_MOST = 4096  # unless the operator wants more
_SWEEP_SECONDS = 1.0


def num_allowed() -> int:
    """How many connections there can be: a quarter of the files that may be open is for adapters and sources."""
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return num_files - num_files // 4


class Connection(Protocol):
    """What is asked of a connection here."""

    def drop(self) -> None:
        """Close at once, for another that needs the room."""

    def time_out(self) -> None:
        """Close: what was waited for has not come in time."""

    def check(self, seconds: float) -> None:
        """See what has moved, `seconds` after the last look."""

    def refuse_unanswered(self) -> None:
        """Answer that the server is stopping, where a request has no answer yet."""


class Connections:
    """Each is in one of three states: a head is due, it is idle between requests, or a request is being worked on.

    Those that wait are told when their time is over, and the one that has waited longest makes room for a new one.
    Only time counts in which the event loop was free: that the server was late is not the client's fault.
    Lives on the event loop.
    """

    def __init__(self, settings: Settings) -> None:
        self._most = settings.max_connections or min(_MOST, num_allowed())
        self._head_seconds = settings.head_seconds
        self._idle_seconds = settings.keep_alive_seconds
        shortest = min(self._head_seconds, self._idle_seconds, settings.stall_seconds)
        self._sweep_seconds = min(_SWEEP_SECONDS, shortest / 4)
        self._heads_due: OrderedDict[Connection, float] = OrderedDict()  # since when, the longest first
        self._idle: OrderedDict[Connection, float] = OrderedDict()
        self._busy: set[Connection] = set()
        self._clock = 0.0
        self._swept_at = 0.0
        self._is_sweeping = False

    def __len__(self) -> int:
        return len(self._heads_due) + len(self._idle) + len(self._busy)

    def enter(self, connection: Connection) -> bool:
        """Take in a new connection, whose head is due. False if there is no room for it and none could be made."""
        has_room = len(self) < self._most or self._make_room()
        self._heads_due[connection] = self._clock
        if not self._is_sweeping:
            self._is_sweeping = True
            self._swept_at = time.monotonic()
            self._sweep_later()
        return has_room

    def await_head(self, connection: Connection) -> None:
        """Its next request has begun to come."""
        self.leave(connection)
        self._heads_due[connection] = self._clock

    def rest(self, connection: Connection) -> None:
        """It has nothing to do until the next request."""
        self.leave(connection)
        self._idle[connection] = self._clock

    def work(self, connection: Connection) -> None:
        """It has a request to answer, or something to be read before it is closed."""
        self.leave(connection)
        self._busy.add(connection)

    def leave(self, connection: Connection) -> None:
        """It is in none of the states."""
        self._heads_due.pop(connection, None)
        self._idle.pop(connection, None)
        self._busy.discard(connection)

    def refuse_unanswered(self) -> None:
        """Leave none without an answer, at the server's end."""
        for connection in list(self._busy):
            connection.refuse_unanswered()

    def _make_room(self) -> bool:
        waiting = self._heads_due or self._idle
        if not waiting:
            return False
        connection, _ = waiting.popitem(last=False)
        connection.drop()
        return True

    def _sweep_later(self) -> None:
        asyncio.get_running_loop().call_later(self._sweep_seconds, self._sweep)

    def _sweep(self) -> None:
        self._is_sweeping = len(self) > 0
        if self._is_sweeping:
            self._sweep_later()
        now = time.monotonic()
        seconds = min(now - self._swept_at, 2 * self._sweep_seconds)
        self._swept_at = now
        self._clock += seconds
        self._time_out(self._heads_due, self._head_seconds)
        self._time_out(self._idle, self._idle_seconds)
        for connection in list(self._busy):
            connection.check(seconds)

    def _time_out(self, waiting: OrderedDict[Connection, float], seconds: float) -> None:
        while waiting and next(iter(waiting.values())) <= self._clock - seconds:
            connection, _ = waiting.popitem(last=False)
            self._busy.add(connection)  # until what it is told has been read
            connection.time_out()


class Pace:
    """Whether a client moves at least `rate` bytes a second, `seconds` of rest aside."""

    def __init__(self, rate: int, seconds: float) -> None:
        self._rate = rate
        self._most = self._ahead = rate * seconds

    def keeps_up(self, num_bytes: int, seconds: float) -> bool:
        """Whether it still does, having moved `num_bytes` in the last `seconds`."""
        self._ahead = min(self._most, self._ahead + num_bytes - self._rate * seconds)
        return self._ahead > 0

    def reset(self) -> None:
        """Nothing was to be moved."""
        self._ahead = self._most
