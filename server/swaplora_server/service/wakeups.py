"""Between other threads and the event loop: what they have it do, and its waiting for what they make.

There is one wake-up of the loop for all that one step of the engine says, not one a token.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from swaplora_server.engine.request import OVERDUE, OVERDUE_CODE
from swaplora_server.service.errors import RequestError

T = TypeVar("T")


class Wakeups:
    """Calls for the event loop that made it. Any thread may post; each call is made once, in the order of posting."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._posted: deque[Callable[[], None]] = deque()
        self._is_called = False  # the loop will look, or has not begun to

    def post(self, call: Callable[[], None]) -> None:
        """Have the loop make `call`, which must not raise. A loop that has closed has nobody left to tell."""
        self._posted.append(call)
        if not self._is_called:
            self._is_called = True
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_called = False  # before the look: what is posted during it calls again
        while self._posted:
            self._posted.popleft()()


async def result_of(future: Future[T]) -> T:
    """Its result or error. Whoever gives up waiting neither cancels it for the others nor has its error logged."""
    waited = asyncio.wrap_future(future)
    waited.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(waited)


async def ended(future: Future[T]) -> None:
    """Return when it is done, whatever came of it."""
    with suppress(Exception):
        await result_of(future)


@asynccontextmanager
async def in_time(deadline: float | None) -> AsyncIterator[None]:
    """Ends its body at `deadline`, on the monotonic clock, by a RequestError; None is never."""
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise RequestError(OVERDUE_CODE, OVERDUE) from None
