"""The actor that counts for all replicas, within this process."""

import asyncio
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

from swaplora_server.cluster.meter import CommonMeter

FAULT = ContextVar[str]("FAULT")  # of the actor's, for one of many requests


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Remote:
    """An actor's handle, whose calls are made here, in turn; or fail."""

    def __init__(self, meter: CommonMeter) -> None:
        self.meter = meter
        self.fault = ""  # gone; late: does what it is told, and fails to say so; silent: does it, and says nothing
        self.num_calls = 0

    def __getattr__(self, method: str) -> Any:
        return Call(self, getattr(self.meter, method))


class Call:
    def __init__(self, remote: Remote, method: Any) -> None:
        self._remote, self._method = remote, method

    def remote(self, *args: Any) -> "Call":
        self._remote.num_calls += 1
        self._fault = FAULT.get(self._remote.fault)
        self._told = None if self._fault == "gone" else self._method(*args)
        return self

    def __await__(self) -> Generator[Any, None, Any]:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        if self._fault == "silent":
            await asyncio.Event().wait()
        if self._fault:
            raise ConnectionError(self._fault)
        return self._told
