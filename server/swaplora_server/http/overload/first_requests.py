"""The first request on a new connection: where it is refused as others were, no more is made of the connection."""

import socket
from contextlib import suppress
from typing import Self
from urllib.parse import unquote

import httptools
from starlette.types import Scope
from uvicorn.server import ServerState

from swaplora_server.http.overload.kept_refusals import Header, KeptRefusals
from swaplora_server.http.transport.heads import MAX_HEAD_BYTES, check_head
from swaplora_server.http.transport.lingering import Lingering
from swaplora_server.service.errors import RequestError

_MOST_BYTES = MAX_HEAD_BYTES  # of a request that is answered here, with its body


class FirstRequests:
    """Answers those that have come whole and are like some that were refused, if they would be now. Closes then.

    All others are left as they came, for who reads connections at length. Lives on the event loop.
    """

    def __init__(self, kept: KeptRefusals, server_state: ServerState) -> None:
        self._kept = kept
        self._server_state = server_state
        self._lingering = Lingering()

    def refuse(self, connection: socket.socket, address: tuple[str, int]) -> bool:
        """Answer and close, if that is all that there is to do on a new connection; False if it is another's to read.

        What has come is read then: the system would cut the connection, and the answer with it, if any of it were not.
        """
        if not self._kept:
            return False
        try:
            data = connection.recv(_MOST_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return False
        request = _Request.read(data)
        answer = None if request is None else self._answer(request, address)
        if request is None or answer is None:
            return False
        with suppress(OSError):  # the client may have gone
            connection.recv(_MOST_BYTES, socket.MSG_DONTWAIT)
            connection.send(answer, socket.MSG_DONTWAIT)
        if request.is_last:
            connection.close()
        else:
            self._lingering.add(connection)
        return True

    def close(self) -> None:
        """Leave no connection open."""
        self._lingering.close_all()

    def _answer(self, request: "_Request", address: tuple[str, int]) -> bytes | None:
        scope = request.scope(address)
        kept = self._kept.find(scope)
        answer = None if kept is None else kept.answer(scope, request.body)
        if answer is None:
            return None
        self._server_state.total_requests += 1
        return answer.whole(self._server_state.default_headers, is_last=True)


class _Request:
    """What httptools finds."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._num_begun = 0
        self._url = self.body = b""
        self._path = ""
        self._headers: list[Header] = []
        self._is_head_whole = self._is_whole = False
        self.is_last = False  # on its connection, as its client says

    @classmethod
    def read(cls, data: bytes) -> Self | None:
        """The request in `data`, if it is a whole one and nothing else."""
        request = cls()
        try:
            request._parser.feed_data(data)
            check_head(request._url, request._headers, request._parser.get_http_version())
            path = httptools.parse_url(request._url).path
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, RequestError):
            return None
        if not request._is_whole or request._num_begun > 1 or path is None:
            return None
        request._path = unquote(path.decode("ascii"))
        return request

    def scope(self, address: tuple[str, int]) -> Scope:
        """What of it is looked at where it is refused."""
        method = self._parser.get_method().decode("ascii")
        return {"method": method, "path": self._path, "headers": self._headers, "client": address}

    def on_message_begin(self) -> None:
        self._num_begun += 1

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_head_whole:  # not a trailer, which nobody asks for
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._is_head_whole = True

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self._is_whole = True
        self.is_last = not self._parser.should_keep_alive()
