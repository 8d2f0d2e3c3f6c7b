"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: on heads, bodies, unread answers, and their time."""

import asyncio
import socket
import uuid
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any, NamedTuple, cast

import httptools
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from swaplora_server.config import Settings
from swaplora_server.http.errors import error_response
from swaplora_server.http.overload.kept_refusals import Kept, KeptRefusals, Refusal, header_line
from swaplora_server.http.transport.browsers import Pages
from swaplora_server.http.transport.connections import Connections, Pace
from swaplora_server.http.transport.heads import MAX_HEAD_BYTES, check_head, joined, too_large
from swaplora_server.service.errors import RequestError

MAX_PIPELINED = 64  # requests behind the one that is being answered
LEFT_BYTES = 256 << 10  # of a body whose request is answered: no more are read at once
LEFT_SECONDS = 0.05  # between two such
_UNSENT_BYTES = 128 << 10  # that the system may hold of what a client does not read
_UPGRADE_HEADERS = (b"connection", b"upgrade", b"http2-settings")
_NOT_HTTP = RequestError("invalid_request", "the request is not well-formed HTTP/1.1")


class HttpConfig(uvicorn.Config):
    """How uvicorn serves `app`: with this protocol, whose connections it keeps, and without lines of its own."""

    def __init__(self, app: ASGIApp, settings: Settings, grace_seconds: int | None = None) -> None:
        """`grace_seconds` are what answers have to end in at shutdown; None for ever."""
        super().__init__(
            app,
            http=BoundedHttpProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="on",
            proxy_headers=False,  # X-Forwarded-For is believed of nobody: the transport looks at the same address
            timeout_graceful_shutdown=grace_seconds,
        )
        self.settings = settings
        self.connections = Connections(settings)
        self.pages = Pages(settings)
        self.kept_refusals = KeptRefusals(settings, self.pages)


class _Undecided(NamedTuple):
    """A request like some that were refused, of which it is not known yet whether it is as well."""

    cycle: RequestResponseCycle
    app: Any
    kept: Kept


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. A client that sends or reads too little, too slowly or too much loses it, and nobody else."""

    def __init__(
        self,
        config: HttpConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        settings = config.settings
        self._connections = config.connections
        self._pages = config.pages
        self._kept_refusals = config.kept_refusals
        self._max_unread_bytes = settings.max_unread_bytes
        self._sending = Pace(settings.min_bytes_per_second, settings.stall_seconds)
        self._reading = Pace(settings.min_bytes_per_second, settings.stall_seconds)
        self._running: RequestResponseCycle | None = None  # not the last one that came, when requests are pipelined
        self._undecided: _Undecided | None = None  # what `_running` is, in the end
        self._refused: Message | None = None  # how the answer begins that is a 429
        self._is_head_due = False  # and some of it is here
        self._is_body_due = False
        self._is_streaming = False
        self._num_unseen_bytes = 0  # that have come and given neither a whole head nor any of a body
        self._num_body_bytes = 0  # since the last look
        self._num_left_bytes = 0  # that came of a body behind its answer, since reading last rested
        self._num_written_bytes = 0  # of bodies, without what frames them
        self._num_read_bytes = 0  # as of the last look

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self._max_unread_bytes)
        _bound_unsent(transport)
        if not self._connections.enter(self):
            self._refuse(RequestError("too_many_connections", "the server has no room for another connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connections.leave(self)
        self._end_running()
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        self._num_unseen_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            told = error.__context__
            self._refuse(told if isinstance(told, RequestError) else _NOT_HTTP)
            return
        if self._num_unseen_bytes > MAX_HEAD_BYTES:
            self._refuse(too_large(f"{MAX_HEAD_BYTES} bytes"))
        elif self._undecided is not None:
            self._decide(self._undecided)

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        """The head of a request for another protocol, to be read as one that does not ask for it.

        The parser leaves what follows such a head to the other protocol: a body would be taken for the next request.
        """
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in _UPGRADE_HEADERS]
        if b"close" in self._header(b"connection").lower():
            lines.append(b"connection: close")
        return b"\r\n".join([*lines, b"", b""])

    # What the parser finds. A RequestError that is raised here comes out of the parser as the context of its own error.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_head_due = True
        if self._is_answered:
            self._connections.await_head(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_head_due:  # not a trailer, which nobody asks for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_unseen_bytes = 0
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise RequestError("invalid_request", "this server is no proxy")
            return
        self._is_head_due = False
        if self.transport.is_closing():  # the client was told that there would be no further answer
            return
        check_head(self.url, self.headers, self.parser.get_http_version())
        self._is_body_due = True
        self._num_body_bytes = 0
        self._sending.reset()
        self._connections.work(self)
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            raise RequestError(
                "invalid_request", f"more than {MAX_PIPELINED} requests wait for the answers before them"
            )
        self.flow.resume_reading()  # or nobody would notice that the client goes

    def on_body(self, body: bytes) -> None:
        self._num_unseen_bytes = 0
        self._num_body_bytes += len(body)
        if self._is_answered:
            self._read_slowly(len(body))
        super().on_body(body)
        if self.flow.read_paused and self.cycle is not self._running:
            # nobody reads it until the answer before it is written, and behind it nobody would see the client go
            raise RequestError(
                "invalid_request", "a large body waits behind another answer: use a connection of its own"
            )

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._num_unseen_bytes = 0
        self._is_body_due = False
        super().on_message_complete()
        if self._undecided is not None:
            self._decide(self._undecided)
        elif self._is_answered:  # before its body was here, and the client was told that this is the end
            self.transport.close()

    def _read_slowly(self, num_bytes: int) -> None:
        """Of what nobody wants: a client that sends as fast as it can would have the event loop to itself."""
        self._num_left_bytes += num_bytes
        if self._num_left_bytes >= LEFT_BYTES and not self.flow.read_paused:
            self._num_left_bytes = 0
            self.flow.pause_reading()
            self.loop.call_later(LEFT_SECONDS, self.flow.resume_reading)

    def _header(self, name: bytes) -> bytes:
        return joined(self.headers or [], name)

    # What is answered.

    @property
    def _is_answered(self) -> bool:
        """Whether no request is being answered."""
        return self._running is None or self._running.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        kept = self._kept_refusals.find(_scope(cycle))
        if kept is None or self.flow.write_paused:  # only the app waits until what it writes is read
            self._have_answered(cycle, app)
            return
        self._undecided = _Undecided(cycle, app, kept)
        if not cycle.more_body:
            self._decide(self._undecided)

    def _decide(self, undecided: _Undecided) -> None:
        """Answer what would be refused as others were, and have the app answer the rest. What hangs on a body waits."""
        cycle, app, kept = undecided
        answer = kept.answer(_scope(cycle), None if cycle.more_body else cycle.body)
        may_wait = cycle.more_body and not cycle.waiting_for_100_continue
        if answer is None and may_wait and kept.looks_at(len(cycle.body)):
            return
        self._undecided = None
        if answer is None:
            self._have_answered(cycle, app)
        else:
            self._answer_refused(cycle, answer)

    def _answer_refused(self, cycle: RequestResponseCycle, answer: Refusal) -> None:
        """Answer 429, as the app would: the connection goes on if the whole request is here."""
        is_last = cycle.more_body or not cycle.keep_alive
        self._is_streaming = False
        self._num_written_bytes += len(answer.body)
        self.transport.write(answer.whole(self.server_state.default_headers, is_last=is_last))
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive and not cycle.more_body:
            self.transport.close()
        self.on_response_complete()

    def _have_answered(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def answer(scope: Scope, receive: Receive, _send: Send) -> None:
            await app(scope, receive, lambda message: self._send(cycle, message))

        super()._start_asgi_task(cycle, answer)  # type: ignore[arg-type]

    async def _send(self, cycle: RequestResponseCycle, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._refused = message if message["status"] == HTTPStatus.TOO_MANY_REQUESTS else None
            self._is_streaming = all(name.lower() != b"content-length" for name, _ in message["headers"])
            if self._is_streaming and cycle.scope["http_version"] == "1.0":
                cycle.chunked_encoding = False  # the end of the connection is the end of the answer
            if cycle.more_body:  # what may still come of the body must not be taken for a request
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        else:
            if self._refused is not None:
                self._kept_refusals.keep(_scope(cycle), self._refused, message.get("body", b""))
            self._note_written(cycle, len(message.get("body", b"")), is_last=not message.get("more_body", False))
        await cycle.send(message)  # type: ignore[arg-type]

    def _note_written(self, cycle: RequestResponseCycle, num_bytes: int, *, is_last: bool) -> None:
        self._num_written_bytes += num_bytes
        if self._is_streaming and not cycle.chunked_encoding:
            cycle.expected_content_length = num_bytes
        if is_last and cycle.more_body:
            cycle.keep_alive = True  # for as long as the body comes: closing now could lose the answer on its way

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._undecided is not None:  # the one behind, whose client may wait to be told
            self._decide(self._undecided)
        self._settle()

    def _settle(self) -> None:
        """Wait for the next request, once the last one is answered and its answer is read."""
        if not self._is_answered or self.transport.is_closing() or self.transport.get_write_buffer_size():
            return
        if self._is_body_due or self._is_head_due:
            self._connections.await_head(self)
        else:
            self._connections.rest(self)

    def pause_writing(self) -> None:
        """More lies unread than may. A whole answer is made already, and is given time; a stream would go on."""
        super().pause_writing()
        if self._is_streaming and not self._is_answered:
            self.loop.call_soon(self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """`Connections` sees to that, also where uvicorn would forget to."""

    # What `Connections` asks of a connection.

    def drop(self) -> None:
        self.transport.abort()

    def time_out(self) -> None:
        if self._is_head_due:
            self._refuse(RequestError("request_timeout", "the request's headers did not come in time"))
        else:
            self.transport.close()

    def refuse_unanswered(self) -> None:
        if self._running is not None and not self._running.response_started:
            self._refuse(RequestError("draining", "the server is shutting down"))

    def check(self, seconds: float) -> None:
        num_unread = self.transport.get_write_buffer_size()
        num_read = self._num_written_bytes - num_unread
        if num_unread and not self._reading.keeps_up(num_read - self._num_read_bytes, seconds):
            self.transport.abort()
        elif not num_unread:
            self._reading.reset()
            self._settle()
        self._num_read_bytes = num_read
        if self._is_body_wanted and not self._sending.keeps_up(self._num_body_bytes, seconds):
            self._refuse(RequestError("request_timeout", "the request's body did not come in time"))
        self._num_body_bytes = 0

    @property
    def _is_body_wanted(self) -> bool:
        """Whether more of a body could come: we read, and the client was told to go on if it asked."""
        is_held = self.flow.read_paused or self.cycle is None or self.cycle.waiting_for_100_continue
        return self._is_body_due and not is_held and not self._is_answered

    def _refuse(self, error: RequestError) -> None:
        """Answer with `error`, unless another answer is on its way, and close."""
        self._connections.work(self)
        if self._running is not None and self._running.response_started and not self._running.response_complete:
            self.transport.abort()
            return
        self._end_running()
        origin = self._header(b"origin").decode("latin-1")
        self.transport.write(_whole_answer(error, self._pages.early_headers(origin)))
        self.transport.close()

    def _end_running(self) -> None:
        self._undecided = None
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()


def _scope(cycle: RequestResponseCycle) -> Scope:
    return cast(Scope, cycle.scope)


def _whole_answer(error: RequestError, headers: Mapping[str, str]) -> bytes:
    answer = error_response(error, {"connection": "close", "x-request-id": uuid.uuid4().hex, **headers})
    first = f"HTTP/1.1 {answer.status_code} {HTTPStatus(answer.status_code).phrase}\r\n".encode()
    return b"".join([first, *map(header_line, answer.raw_headers), b"\r\n", answer.body])


def _bound_unsent(transport: asyncio.Transport) -> None:
    """Have the system take little of what the client cannot take, so that it is known here."""
    connection = transport.get_extra_info("socket")
    if hasattr(socket, "TCP_NOTSENT_LOWAT") and connection is not None:
        with suppress(OSError):  # the client may have gone already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
