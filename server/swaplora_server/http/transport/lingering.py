"""Connections that are answered for the last time, and closed when that can no longer take the answer with it."""

import asyncio
import socket
from collections import deque
from contextlib import suppress

LINGER_SECONDS = 1.0
MAX_LINGERING = 128


class Lingering:
    """Connections that are answered and would be closed, but for what their clients may be sending.

    What comes to a closed connection has the system cut it, so that the client may lose the answer before it is read.
    """

    def __init__(self) -> None:
        self._since: deque[tuple[float, socket.socket]] = deque()

    def add(self, connection: socket.socket) -> None:
        """Tell the client that no more comes, and close in a while, or when there are too many."""
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        if not self._since:
            loop.call_later(LINGER_SECONDS, self._close_old)
        elif len(self._since) >= MAX_LINGERING:
            self._close_oldest()
        self._since.append((loop.time(), connection))

    def close_all(self) -> None:
        while self._since:
            self._close_oldest()

    def _close_old(self) -> None:
        loop = asyncio.get_running_loop()
        while self._since and self._since[0][0] <= loop.time() - LINGER_SECONDS:
            self._close_oldest()
        if self._since:
            loop.call_at(self._since[0][0] + LINGER_SECONDS, self._close_old)

    def _close_oldest(self) -> None:
        _, connection = self._since.popleft()
        connection.close()
