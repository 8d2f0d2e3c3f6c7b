"""A request as it goes from the ingress to a replica, and what the replica's app makes of it."""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Scope

from swaplora_server.http.auth import COUNTED_AS

MAX_UNHEARD = 15  # times that fronts are looked at, in which one that lives is heard
WANTS_BODY = "swaplora.wants_body"  # a message beside ASGI's: the app reads, and nothing of the body is here
_PASSED_ON = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip


@dataclass(frozen=True)  # with slots it would be sent without names of fields, and another release may have one more
class Forwarded:
    """A request: its ASGI scope, what is here of its body, and whether that is all of it.

    With `exchange_id` those who bring the rest of the body say which request they mean. `front` is the one that passes
    it on, where that says from then on that it lives.
    """

    scope: dict[str, Any]
    body: bytes
    is_whole: bool
    exchange_id: str
    front: str = ""


class Answer(NamedTuple):
    """A whole answer, and which replica gave it."""

    replica: str
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def messages(self) -> list[Message]:
        """As ASGI has it."""
        start = {"type": "http.response.start", "status": self.status, "headers": self.headers}
        return [start, {"type": "http.response.body", "body": self.body, "more_body": False}]


def scope_to_send(scope: Scope, request_id: str) -> dict[str, Any]:
    """What of a scope a replica needs: plain data. The request keeps the id that it has here.

    Limits count it once, however many replicas are asked: for that it has a name that no client gives.
    """
    headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    return {
        **{name: scope[name] for name in _PASSED_ON if name in scope},
        "headers": [*headers, (b"x-request-id", request_id.encode())],
        COUNTED_AS: uuid.uuid4().hex,
    }


class Exchange:
    """One request within an app. Belongs to the event loop."""

    def __init__(self, app: ASGIApp, request: Forwarded) -> None:
        self.front = request.front
        self._app = app
        self._scope = dict(request.scope)
        self._parts: deque[Message] = deque()
        self._is_whole = False
        self._is_gone = False
        self._is_asked = False
        self._more = asyncio.Event()  # of the body, or the client has gone
        self._sent: list[Message] = []
        self._has_sent = asyncio.Event()
        if request.body or request.is_whole:
            self.feed(request.body, is_last=request.is_whole)

    def feed(self, body: bytes, *, is_last: bool) -> None:
        """The next of the body."""
        self._is_whole = is_last
        self._is_asked = False
        self._parts.append({"type": "http.request", "body": body, "more_body": not is_last})
        self._more.set()

    async def messages(self) -> AsyncGenerator[list[Message]]:
        """What the app sends, as much at once as is there. Closing it is the client's going, and waits for the app."""
        running = asyncio.ensure_future(self._app(self._scope, self._receive, self._send))
        running.add_done_callback(lambda _task: self._has_sent.set())
        try:
            while not running.done() or self._sent:
                await self._has_sent.wait()
                self._has_sent.clear()
                if self._sent:
                    sent, self._sent = self._sent, []
                    yield sent
                if running.done():
                    self._has_sent.set()
            running.result()
        finally:
            self.leave()
            await asyncio.wait({running})

    def leave(self) -> None:
        """The client goes, or whoever passes on what it asks."""
        self._is_gone = True
        self._more.set()

    async def _receive(self) -> Message:
        while not self._parts and not self._is_gone:
            if not self._is_whole and not self._is_asked:
                self._is_asked = True
                await self._send({"type": WANTS_BODY})
            self._more.clear()
            await self._more.wait()
        return {"type": "http.disconnect"} if self._is_gone else self._parts.popleft()

    async def _send(self, message: Message) -> None:
        if not self._is_gone:  # else nobody hears it, as with a connection that has ended
            self._sent.append(message)
            self._has_sent.set()


class Exchanges:
    """All requests within an app, by id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._running: dict[str, Exchange] = {}
        self._unheard: dict[str, int] = {}  # by front: how often it was looked at since it was heard
        self._heard: set[str] = set()  # of them those that said so themselves

    async def stream(self, request: Forwarded) -> AsyncGenerator[list[Message]]:
        """See `Exchange.messages`; the first list is empty, and says that the request is here."""
        with self._begun(request) as exchange:
            yield []
            messages = exchange.messages()
            try:
                async for sent in messages:
                    yield sent
            finally:
                await messages.aclose()

    def feed(self, exchange_id: str, body: bytes, *, is_last: bool) -> bool:
        """The next of a body; False if its request is not here."""
        exchange = self._running.get(exchange_id)
        if exchange is not None:
            exchange.feed(body, is_last=is_last)
        return exchange is not None

    def hear(self, front: str) -> None:
        """It lives."""
        self._unheard[front] = 0
        self._heard.add(front)

    def is_unheard(self, front: str) -> bool:
        """Whether it says that it lives, and has not said so since it has something here."""
        return bool(front) and front not in self._heard

    def look_at_fronts(self) -> None:
        """End what those have here that have gone and not said so. To be called every now and then.

        That counts, and not a clock: while this process stands still it hears nobody.
        """
        fronts = {exchange.front for exchange in self._running.values() if exchange.front}
        self._unheard = {front: self._unheard.get(front, 0) + 1 for front in fronts}
        self._heard &= fronts
        for exchange in self._running.values():
            if self._unheard.get(exchange.front, 0) > MAX_UNHEARD:
                exchange.leave()

    @contextmanager
    def _begun(self, request: Forwarded) -> Iterator[Exchange]:
        exchange = self._running[request.exchange_id] = Exchange(self._app, request)
        self._unheard[request.front] = 0
        try:
            yield exchange
        finally:
            del self._running[request.exchange_id]


async def whole_answer(exchanges: Exchanges, request: Forwarded, replica: str) -> Answer:
    """Of a request whose body is whole."""
    status, headers, body = 500, [], bytearray()
    async for sent in exchanges.stream(request):
        for message in sent:
            if message["type"] == "http.response.start":
                status, headers = message["status"], [(bytes(name), bytes(value)) for name, value in message["headers"]]
            else:
                body += message.get("body", b"")
    return Answer(replica, status, headers, bytes(body))
