"""Threads for what changes names, which may wait for the shared store, and for its turn."""

import asyncio
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import TypeVar

from swaplora_adapters.registry.changes import HOLD_SECONDS, Changes
from swaplora_server.service.offload import Offload

T = TypeVar("T")


class Changers:
    """Do jobs, `num_threads` at once, in the order of their coming. Belong to the event loop.

    No exit waits for one that hangs, and nobody for the turn behind it.
    """

    def __init__(self, num_threads: int, name: str, begin: Callable[[], None] = lambda: None) -> None:
        """Each thread calls `begin` before its job."""
        self._threads = Offload(num_threads, sys.maxsize, name, begin)

    @property
    def num_running(self) -> int:
        return self._threads.num_running

    async def do(self, changes: Changes, job: Callable[[], T]) -> T:
        """What `job` returns or raises; or, as long as it has not begun, what `changes.check_known` raises."""
        changes.check_known()
        context, has_begun = copy_context(), threading.Event()

        def begin() -> T:
            has_begun.set()
            return context.run(job)

        doing = asyncio.ensure_future(self._threads.do(0, begin))
        try:
            while not (doing.done() or has_begun.is_set()):
                await asyncio.wait({doing}, timeout=HOLD_SECONDS)
                if not has_begun.is_set():
                    changes.check_known()
            return await doing
        finally:
            doing.cancel()  # takes one that waits with it

    def join(self, seconds: float) -> None:
        """Wait for what runs, `seconds` at most. Callable from any thread."""
        self._threads.join(seconds)
