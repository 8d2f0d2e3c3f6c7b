"""Bodies of requests in the front: those that say who is to answer are read whole, others in parts."""

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope

from swaplora_server.access.caller import Caller, KeyScope
from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.front.route_key import ANYWHERE, key_of_body
from swaplora_server.config import Settings
from swaplora_server.http.dependencies import ADAPTER_HEADER
from swaplora_server.http.transport.body import is_json
from swaplora_server.http.transport.body_memory import BodyAccount, BodyMemory
from swaplora_server.http.transport.encoding import body_chunks
from swaplora_server.service.errors import RequestError

PART_BYTES = 1 << 20  # of a body that is not read whole: what of it is here at once
_PART_SECONDS = 0.1  # that more of a part is waited for
_LARGE_BYTES = 1 << 15  # that are parsed on a thread
_MAX_PARSED = 2  # large bodies at once


class Bodies:
    """How much of them is in memory, and what is read of them. Belongs to the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._memory = BodyMemory(settings.body_memory_bytes)
        self._shares: dict[str, BodyMemory] = {}  # of it, by tenant
        self._parsing = asyncio.Semaphore(_MAX_PARSED)

    @property
    def used_bytes(self) -> int:
        return self._memory.used_bytes

    def of(self, caller: Caller | None) -> BodyMemory:
        """No tenant holds more than half of it: what it sends beyond that is not read here."""
        if caller is None:
            return self._memory
        limit = self._settings.body_memory_bytes // 2
        return self._shares.setdefault(caller.tenant, BodyMemory(limit, self._memory))

    def is_read(self, scope: Scope, caller: Caller | None) -> bool:
        """Whether its body is JSON of a size and a sender that are not refused by what its headers say."""
        if caller is None or scope["method"] != "POST":
            return False
        headers = Headers(scope=scope)
        content_type = headers.get("content-type", "")
        is_small = int(headers.get("content-length", "0")) <= self._settings.max_body_bytes
        return caller.may({KeyScope.GENERATE}) and is_small and (not content_type or is_json(content_type))

    async def read(self, receive: Receive, account: BodyAccount) -> tuple[bytes, bool]:
        """A body, or as much of it as one may have and there is memory for, and whether that is all."""
        body, has_room = bytearray(), True
        while has_room and len(body) <= self._settings.max_body_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            has_room = account.has_added(len(message.get("body", b"")))
            if not message.get("more_body", False):
                return bytes(body), True
        return bytes(body), False

    async def key(self, scope: Scope, body: bytes, tenant: str, account: BodyAccount) -> RouteKey:
        """A body that cannot be read, or for which there is no memory, is refused where it is answered.

        `account` is for what is decoded.
        """
        headers = Headers(scope=scope)
        adapter = headers.get(ADAPTER_HEADER) if scope["path"].endswith("/invocations") else None
        read = partial(key_of_body, tenant=tenant, base_id=self._settings.base_id, adapter=adapter)
        try:
            decoded = await self._decoded(scope, body, account.add) if "content-encoding" in headers else body
            if len(decoded) <= _LARGE_BYTES:
                return read(decoded)
            async with self._parsing:
                return await asyncio.to_thread(read, decoded)
        except RequestError:
            return ANYWHERE
        finally:
            account.close()

    async def _decoded(self, scope: Scope, body: bytes, count: Any) -> bytearray:
        """Raises RequestError."""
        limit = self._settings.max_body_bytes
        decoded = bytearray()
        async for chunk in body_chunks(Request(scope, _whole(body)), limit):
            count(len(chunk))
            decoded += chunk
            if len(decoded) > limit:
                raise RequestError("body_too_large", f"the body is larger than {limit} bytes")
        return decoded


async def next_part(receive: Receive, account: BodyAccount) -> tuple[bytes, bool]:
    """What comes next of a body, and whether it is the last. Raises ClientDisconnect.

    PART_BYTES of it where there are as many at once and memory for them: what comes slowly is passed on as it is.
    """
    part = bytearray()
    with suppress(TimeoutError):
        async with asyncio.timeout(None) as patience:
            has_room = True
            while has_room and len(part) < PART_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                if patience.when() is None:
                    patience.reschedule(asyncio.get_running_loop().time() + _PART_SECONDS)
                part += message.get("body", b"")
                has_room = account.has_added(len(message.get("body", b"")))
                if not message.get("more_body", False):
                    return bytes(part), True
    return bytes(part), False


async def until_gone(receive: Receive) -> tuple[bytes, bool]:
    """Raises ClientDisconnect when the client goes."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


def has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _whole(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
