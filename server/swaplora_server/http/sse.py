"""Server-sent events, and noticing that the client has gone."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from swaplora_server.http.errors import error_body
from swaplora_server.service.errors import RequestError

PING_SECONDS = 15.0
DONE = "data: [DONE]\n\n"
_PING = b": ping\n\n"
# nothing here contains itself, and a chunk is written once a token
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client closed its connection before it was answered."""


def event(data: Mapping[str, Any]) -> str:
    """The one place where an object becomes part of a stream."""
    return f"data: {_to_json(data)}\n\n"


def named_event(name: str, data: Mapping[str, Any]) -> str:
    """The same, of a stream whose events have names."""
    return f"event: {name}\n{event(data)}"


class EventStreamResponse(Response):
    """Sends what `events` yields as it comes, with a comment every 15 silent seconds; the first of either begins it.

    A RequestError out of `events` is raised while nothing was sent, so that it is answered with its status, and is an
    event after that. The client's going is noticed at once, even while nothing is being sent; `events` is closed in
    every case.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], headers: Mapping[str, str], at_end: Callable[[], None]) -> None:
        """`at_end` is called when the response is over, even one whose events were never begun."""
        self._events = events
        self._at_end = at_end
        self._has_begun = False
        self._sending = asyncio.Lock()  # a comment and an event begin the response once
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGoneError, OSError):
                await until_disconnect(receive, self._send_all(send))
        finally:
            self._at_end()

    async def _send_all(self, send: Send) -> None:
        self._sent_at = time.monotonic()
        pings = asyncio.ensure_future(self._ping(send))
        try:
            async for events in self._events:
                await self._write(send, events)
        except RequestError as error:
            if not self._has_begun:
                raise
            await self._write(send, f"{event(error_body(error.code, error.message))}{DONE}".encode())
        finally:
            pings.cancel()
            await asyncio.wait({pings})
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, events: bytes) -> None:
        self._sent_at = time.monotonic()
        async with self._sending:
            if not self._has_begun:
                self._has_begun = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": events, "more_body": True})

    async def _ping(self, send: Send) -> None:
        """For as long as it is let: one sleeper a stream, so that what is sent has no timer to set and to cancel."""
        with suppress(OSError):
            while True:
                await asyncio.sleep(self._sent_at + PING_SECONDS - time.monotonic())
                if time.monotonic() >= self._sent_at + PING_SECONDS:
                    await self._write(send, _PING)


async def until_disconnect(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of `work`, unless the client goes first: then `work` is cancelled and ClientGoneError raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
