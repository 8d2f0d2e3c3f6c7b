"""uvicorn's server, on connections that it accepts itself: some are answered before anything is made of them."""

import asyncio
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import structlog
import uvicorn
from uvicorn.config import STARTUP_FAILURE

from swaplora_server.http.overload.first_requests import FirstRequests
from swaplora_server.http.transport.protocol import BoundedHttpProtocol, HttpConfig

_MOST_AT_ONCE = 64  # connections, before all else on the event loop has its turn
_SILENT_SECONDS = 1  # that a connection on which nothing has come is left to the system
_FULL_SECONDS = 1.0  # until the next try, where there was no room for another
_LATE_SECONDS = 0.5  # for the request on a connection that was accepted as the server began to end
_log = structlog.get_logger(__name__)


class HttpServer(uvicorn.Server):
    """Serves on the sockets that `run` or `serve` is given, which listen."""

    def __init__(self, config: HttpConfig) -> None:
        super().__init__(config)
        self._http = config

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        first = FirstRequests(self._http.kept_refusals, self.server_state)
        servers: list[Any] = [Acceptor(listener, first, self._connection) for listener in sockets or ()]
        self.servers = servers  # as uvicorn ends them
        self.started = True

    def _connection(self) -> BoundedHttpProtocol:
        return BoundedHttpProtocol(self._http, self.server_state, self.lifespan.state)


class Acceptor:
    """Accepts connections on a socket, in an asyncio server's place. Lives on the event loop."""

    def __init__(
        self, listener: socket.socket, first: FirstRequests, protocol: Callable[[], BoundedHttpProtocol]
    ) -> None:
        self._listener = listener
        self._first = first
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._handed_on: set[asyncio.Task[tuple[asyncio.Transport, BoundedHttpProtocol]]] = set()
        self._is_closed = False
        listener.setblocking(False)
        if hasattr(socket, "TCP_DEFER_ACCEPT"):  # what comes with a request on it is looked at once
            with suppress(OSError):  # where a sandbox does not know it
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _SILENT_SECONDS)
        self._listen()

    def close(self) -> None:
        """Accept no more."""
        self._is_closed = True
        self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """Called when all connections have ended: those that were answered here have had their time as well."""
        self._first.close()

    def _listen(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.warning("no connection can be accepted", reason=error.strerror)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(_FULL_SECONDS, self._listen)
                return
            if not self._is_refused(connection, address[:2]):  # of IPv6 there is more
                task = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
                self._handed_on.add(task)
                task.add_done_callback(self._forget)

    def _is_refused(self, connection: socket.socket, address: tuple[str, int]) -> bool:
        try:
            return self._first.refuse(connection, address)
        except Exception:  # noqa: BLE001 - or the connection would be lost without an answer
            _log.exception("a first request could not be looked at")  # and is answered as all others are
            return False

    def _forget(self, task: "asyncio.Task[tuple[asyncio.Transport, BoundedHttpProtocol]]") -> None:
        self._handed_on.discard(task)
        if self._is_closed and not task.cancelled() and task.exception() is None:
            # uvicorn has told its connections to end, and did not know this one
            self._loop.call_later(_LATE_SECONDS, task.result()[1].shutdown)
