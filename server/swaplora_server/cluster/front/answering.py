"""The answer to one request, as far as it is."""

import asyncio
from contextlib import suppress
from typing import Any

from starlette.types import Message, Send

from swaplora_server.cluster.exchange import Answer
from swaplora_server.cluster.front.lost import LAST_EVENT


class Answering:
    """An ASGI `send` that knows how far its answer is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False
        self.is_whole = False
        self.is_event_stream = False
        self.num_events = 0  # that were sent whole
        self.has_said_all = False  # the last event, behind which nothing comes

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            headers = {bytes(name).lower(): bytes(value) for name, value in message["headers"]}
            self.is_event_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        else:
            self.is_whole = not message.get("more_body", False)
            if self.is_event_stream:
                body = message.get("body", b"")
                self.num_events += body.count(b"\n\n") - body.count(b": ping\n\n")
                self.has_said_all = self.has_said_all or LAST_EVENT.search(body) is not None
        await self._send(message)

    async def all_of(self, answer: Answer) -> None:
        for message in answer.messages:
            await self(message)


async def cancelled(*tasks: asyncio.Future[Any] | None) -> None:
    """All of them, which have ended when this returns."""
    for task in filter(None, tasks):
        task.cancel()
        with suppress(BaseException):
            await task
