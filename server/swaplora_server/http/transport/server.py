"""uvicorn's server, on connections that it accepts itself: some are answered before anything is made of them."""

import asyncio
import errno
import socket
import sys
from collections.abc import Callable
from typing import Any

import structlog
import uvicorn
from uvicorn.config import STARTUP_FAILURE

from swaplora_server.http.overload.first_requests import FirstRequests
from swaplora_server.http.transport.protocol import BoundedHttpProtocol, HttpConfig

_MOST_AT_ONCE = 64  # connections, before all else on the event loop has its turn
_SILENT_SECONDS = 1  # that a connection on which nothing has come is left to the system
_FULL_SECONDS = 0.1  # until the next try, where there was no room for another
_IS_FULL = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
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
        self, listener: socket.socket, first: FirstRequests, protocol: Callable[[], asyncio.BaseProtocol]
    ) -> None:
        self._listener = listener
        self._first = first
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._handed_on: set[asyncio.Task[object]] = set()
        self._is_closed = False
        listener.setblocking(False)
        if hasattr(socket, "TCP_DEFER_ACCEPT"):  # what comes with a request on it is looked at once
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _SILENT_SECONDS)
        self._listen()

    def close(self) -> None:
        """Accept no more."""
        self._is_closed = True
        self._loop.remove_reader(self._listener)
        self._first.close()

    async def wait_closed(self) -> None:
        """Nothing is left to wait for."""

    def _listen(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                if error.errno in _IS_FULL:
                    _log.warning("no connection can be accepted", reason=error.strerror)
                    self._loop.remove_reader(self._listener)
                    self._loop.call_later(_FULL_SECONDS, self._listen)
                return
            if not self._first.refuse(connection, address[:2]):  # of IPv6 there is more
                task = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
                self._handed_on.add(task)
                task.add_done_callback(self._handed_on.discard)
