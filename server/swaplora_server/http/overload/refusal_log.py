"""Requests that are refused without the app, in the log: not a line for each, but one a second that counts them."""

import asyncio
from collections import Counter
from typing import NamedTuple

import structlog

from swaplora_server.access.caller import Caller

SECONDS = 1.0
_log = structlog.get_logger(__name__)


class _Refused(NamedTuple):
    method: str
    route: str
    tenant: str
    key: str
    error: str


class RefusalLog:
    """Lives on the event loop."""

    def __init__(self) -> None:
        self._counts: Counter[_Refused] = Counter()

    def add(self, method: str, route: str, caller: Caller, error: str) -> None:
        """One more was refused."""
        if not self._counts:
            asyncio.get_running_loop().call_later(SECONDS, self._write)
        self._counts[_Refused(method, route, caller.tenant, caller.key_id, error)] += 1

    def _write(self) -> None:
        counts, self._counts = self._counts, Counter()
        for refused, count in counts.items():
            _log.info("requests refused", **refused._asdict(), count=count)
