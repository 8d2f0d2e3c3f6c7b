"""Replicas that say what a test has them say, and requests to the ingress before them."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Message, Receive

from swaplora_server.access.key_ring import KeyRing
from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.engines import ReplicaLostError
from swaplora_server.cluster.exchange import Answer, Forwarded
from swaplora_server.cluster.front.ingress import Ingress
from swaplora_server.config import Settings

KEY = [(b"authorization", b"Bearer k")]
JSON = [*KEY, (b"content-type", b"application/json")]
MIB = 1 << 20


EVENTS: list[Message] = [
    {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]},
    {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True},
]


def answer(status: int, body: bytes = b"", content_type: bytes = b"application/json") -> list[Message]:
    start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]}
    return [start, {"type": "http.response.body", "body": body, "more_body": False}]


@dataclass
class Scripted:
    """Replicas that say what a test has them say."""

    messages: list[Message] = field(default_factory=lambda: answer(200))
    answers: list[Answer | Exception | float] = field(default_factory=list)  # a number: seconds of waiting
    streamed: list[Forwarded] = field(default_factory=list)
    asked: list[Forwarded] = field(default_factory=list)
    is_closed: bool = False
    hangs: bool = False  # after its messages
    is_lost: bool = False  # likewise
    has_ended: bool = False  # by itself

    async def stream(self, _key: RouteKey, request: Forwarded) -> AsyncGenerator[list[Message]]:
        self.streamed.append(request)
        yield []
        for message in self.messages:
            yield [dict(message)]
        if self.hangs:
            await asyncio.Event().wait()
        if self.is_lost:
            raise ReplicaLostError("a fault of the test")
        for _ in range(5):  # as one that is told of its end by others
            await asyncio.sleep(0)
        self.has_ended = True

    async def feed(self, exchange_id: str, body: bytes, *, is_last: bool) -> None:
        raise ReplicaLostError(f"nobody has {exchange_id}, {len(body)}, {is_last}")

    async def ask_all(self, request: Forwarded) -> AsyncGenerator[Answer]:
        self.asked.append(request)
        try:
            for each in self.answers:
                if isinstance(each, Exception):
                    raise each
                if isinstance(each, float):
                    await asyncio.sleep(each)
                else:
                    yield each
        finally:
            self.is_closed = True


@dataclass
class Asked:
    """A request, and what came of it."""

    sent: list[Message] = field(default_factory=list)
    num_read: int = 0

    @property
    def status(self) -> Any:
        return self.sent[0]["status"]

    @property
    def code(self) -> Any:
        return json.loads(b"".join(message.get("body", b"") for message in self.sent))["error"]["code"]


def front(engines: Scripted, **fields: Any) -> Ingress:
    return Ingress(Settings(api_key=("k",), **fields), engines, KeyRing(["k"], None))


async def ask(
    app: Ingress,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Any = (),
    gone: asyncio.Event | None = None,
    on_sent: Callable[[Message], None] = lambda _message: None,
    receive: Receive | None = None,
) -> Asked:
    asked = Asked()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_whole() -> Message:
        if messages and gone is None:
            asked.num_read += len(body)
            return messages.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        asked.sent.append(message)
        on_sent(message)

    length = [(b"content-length", str(len(body)).encode())] if body else []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": [*length, *headers],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive or receive_whole, send), 60)
    return asked
