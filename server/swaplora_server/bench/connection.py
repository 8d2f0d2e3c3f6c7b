"""One request over HTTP/1.1, on a connection of its own, with its answer stamped as the bytes arrive.

httptools reads the response and nothing stands between it and the socket: a load generator shares the machine with the
server that it measures.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, cast
from urllib.parse import SplitResult, urlsplit

import httptools

from swaplora_server.bench.answer import Answer, error_words
from swaplora_server.bench.options import OptionsError
from swaplora_server.bench.sse_reader import EventReader

ANSWER_SECONDS = 3600.0  # after which a request that is not answered has failed
MAX_ERROR_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go, and the head that each of them begins with."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    path: str  # below which the server answers
    head: str

    @classmethod
    def of(cls, url: str, api_key: str | None) -> Self:
        """The completions route of the server at `url`. Raises OptionsError."""
        parts = _split(url)
        path = parts.path.rstrip("/")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise OptionsError("the API key has a character in it that is not printable ASCII: check how it was given")
        authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        head = (
            f"POST {path}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Content-Type: application/json\r\nConnection: close\r\n{authorization}"
        )
        is_tls = parts.scheme == "https"
        tls = ssl.create_default_context() if is_tls else None
        return cls(cast(str, parts.hostname), parts.port or (443 if is_tls else 80), tls, path, head)

    def message(self, body: bytes) -> bytes:
        """A whole request."""
        return f"{self.head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(endpoint: Endpoint, answer: Answer) -> Answer:
    """Send `answer.request` and fill in `answer`. Nothing is raised for what goes wrong: `answer.failure` says it."""
    loop, message = asyncio.get_running_loop(), endpoint.message(answer.request.body)
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            transport, exchange = await loop.create_connection(
                lambda: _Connection(answer, message), endpoint.host, endpoint.port, ssl=endpoint.tls
            )
            try:
                await exchange.ended
            finally:
                transport.abort()
    except TimeoutError:
        answer.fail(f"no answer within {ANSWER_SECONDS:.0f} s")
    except OSError as error:
        answer.fail(f"no connection to {endpoint.host}:{endpoint.port}: {error.strerror or error}")
    answer.ended = time.perf_counter()
    return answer


class _Connection(asyncio.Protocol):
    """A connection on which one request is sent and one response read."""

    def __init__(self, answer: Answer, message: bytes) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answer = answer
        self._message = message
        self._events = EventReader()
        self._parser = httptools.HttpResponseParser(self)
        self._refusal: bytearray | None = None  # the body of an answer that is no stream, as it comes
        self._now = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._message)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._answer.fail(f"what answers is not HTTP/1.1: {error}")
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self._finish(f"the connection broke off: {error}" if error else "the connection was closed")

    def on_headers_complete(self) -> None:
        if self._parser.get_status_code() != 200:
            self._refusal = bytearray()

    def on_body(self, body: bytes) -> None:
        if self._refusal is not None:
            self._refusal += body[: MAX_ERROR_BYTES - len(self._refusal)]
            return
        for data in self._events.feed(body):
            self._answer.read_event(data, self._now)
            if self._answer.is_done or self._answer.failure:
                self._end()
                return

    def on_message_complete(self) -> None:
        self._finish("the stream was ended")

    def _finish(self, how: str) -> None:
        """No more will come: a refusal is whole now, and a stream without its last event is not."""
        if self._refusal is not None:
            self._answer.fail(f"HTTP {self._parser.get_status_code()}: {_refusal_words(bytes(self._refusal))}")
        elif not self._answer.is_done:
            self._answer.fail(f"{how} before the answer was whole, after {len(self._answer.stamps)} chunks with tokens")
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def _refusal_words(body: bytes) -> str:
    try:
        content: Mapping[str, object] | str = json.loads(body)
    except ValueError:
        content = body.decode(errors="replace")
    return error_words(content)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not (is_address and url.isascii() and url.isprintable() and " " not in url):
        raise OptionsError(f"{url} is not a server's address: it must be http://HOST:PORT or https://HOST")
    if parts.query or parts.fragment or parts.username is not None:
        raise OptionsError(f"{url}: give only the server's address, and a key with --api-key")
    return parts
