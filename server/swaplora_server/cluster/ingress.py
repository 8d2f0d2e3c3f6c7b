"""The ingress: plain ASGI in front of the replicas. It parses nothing but who is to answer, and changes no answer."""

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from swaplora_server.access.caller import Caller, KeyScope
from swaplora_server.access.key_ring import KeyRing
from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.engines import Engines, ReplicaLostError
from swaplora_server.cluster.exchange import WANTS_BODY, Answer, Forwarded, scope_to_send
from swaplora_server.cluster.gathered import (
    ALL_OF_A_LIST,
    HEALTH,
    READY,
    Gathered,
    best,
    gathered_as,
    is_of_one,
    is_page,
)
from swaplora_server.cluster.lost import LAST_EVENT, last_event
from swaplora_server.cluster.route_key import ANYWHERE, key_of_body, key_of_path
from swaplora_server.config import Settings
from swaplora_server.http.auth import given_key
from swaplora_server.http.dependencies import request_id
from swaplora_server.http.errors import error_response
from swaplora_server.http.routes.invocations import ADAPTER_HEADER
from swaplora_server.http.sse import PING_SECONDS
from swaplora_server.http.tasks import TIMEOUT_HEADER
from swaplora_server.http.transport.body import is_json
from swaplora_server.http.transport.body_memory import BodyAccount, BodyMemory
from swaplora_server.http.transport.browsers import early_headers
from swaplora_server.http.transport.encoding import body_chunks
from swaplora_server.http.transport.request_id import RequestIdMiddleware
from swaplora_server.service.errors import RequestError

PART_BYTES = 1 << 20  # of a body that is not read whole: what of it is here at once
_PART_SECONDS = 0.1  # that more of a part is waited for
_LARGE_BYTES = 1 << 15  # that are parsed on a thread
_MAX_PARSED = 2  # large bodies at once
_START_SECONDS = 30.0  # that a replica may take to have a request
_SILENT_SECONDS = 3 * PING_SECONDS  # of a stream's replica, after which it hangs
_END_SECONDS = 1.0  # that it may take to end once all is said
_LOST = RequestError(
    "engine_failed", "the replica that was answering this request has gone; ask again", retry_seconds=1
)
_STOPPING = RequestError("draining", "the server is shutting down")
_FAILED = RequestError("internal_error", "the server failed to answer this request")
_NONE = RequestError("not_ready", "no replica can take the request yet; GET /health/ready says when one can")
_OF_ONE = re.compile(r"/v1/adapters/[^/]+")  # what one replica alone may know of yet: an adapter on its way
_Gone = asyncio.Task[tuple[bytes, bool]]  # which ends when the client goes, if there is nothing more to come of it
_log = structlog.get_logger(__name__)


class Ingress:
    """The whole HTTP surface of the replicas. Belongs to the event loop."""

    def __init__(self, settings: Settings, engines: Engines, keys: KeyRing) -> None:
        """`keys` are those of the settings: whose a request is, others decide."""
        self._settings = settings
        self._engines = engines
        self._keys = keys
        self._bodies = BodyMemory(settings.body_memory_bytes)
        self._shares: dict[str, BodyMemory] = {}  # of it, by tenant
        self._parsing = asyncio.Semaphore(_MAX_PARSED)
        self._early_headers = early_headers(settings)
        self._is_draining = False
        self._ending = asyncio.Event()
        self._app = RequestIdMiddleware(self._answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def drain(self) -> None:
        """Refuse what comes from now on."""
        self._is_draining = True

    def end_all(self) -> None:
        """Tell all whose answer is not whole yet that it ends."""
        self._ending.set()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        answering = _Answering(send)
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        path, caller = scope["path"].removeprefix(self._settings.root_path), self._caller(scope)
        memory = self._bodies if caller is None else self._share(caller.tenant)
        account = memory.account()
        try:
            if self._is_draining and (scope["method"] not in ("GET", "HEAD") or path in READY):
                raise _STOPPING
            how = gathered_as(scope["method"], path)
            if how is not None and (caller is not None or path in HEALTH):
                await self._gather(how, scope, receive, answering)
                return
            tenant = "" if caller is None else caller.tenant
            key, body, is_whole = key_of_path(path, tenant), b"", not _has_body(scope)
            if caller is not None and scope["method"] == "POST" and self._is_read(scope, caller):
                body, is_whole = await self._read(receive, account)
                key = await self._key(scope, body, tenant, memory) if is_whole and key == ANYWHERE else key
            request = Forwarded(scope_to_send(scope, request_id()), body, is_whole, uuid.uuid4().hex)
            is_of_one = scope["method"] in ("GET", "HEAD", "DELETE") and _OF_ONE.fullmatch(path) is not None
            may_be_elsewhere = is_of_one and caller is not None
            await self._exchange(key, request, receive, answering, memory, may_be_elsewhere=may_be_elsewhere)
        except ClientDisconnect:
            return
        except RequestError as error:
            await self._refuse(error, scope, receive, answering)
        except ReplicaLostError as error:
            _log.error("a replica was lost while it answered", path=scope["path"], reason=str(error))
            await self._refuse(_LOST, scope, receive, answering)
        except Exception:  # noqa: BLE001 - the boundary: what nobody foresaw is answered all the same
            _log.exception("a request failed", path=scope["path"])
            await self._refuse(_FAILED, scope, receive, answering)
        finally:
            account.close()

    def _caller(self, scope: Scope) -> Caller | None:
        """Whose request it is; None for a key that is not good, with which nothing is read."""
        return self._keys.find(given_key(Headers(scope=scope)))

    def _share(self, tenant: str) -> BodyMemory:
        """No tenant holds more than half of it: what it sends beyond that is not read here."""
        limit = self._settings.body_memory_bytes // 2
        return self._shares.setdefault(tenant, BodyMemory(limit, self._bodies))

    def _is_read(self, scope: Scope, caller: Caller) -> bool:
        """Whether its body is JSON of a size and a sender that are not refused by what its headers say."""
        headers = Headers(scope=scope)
        content_type = headers.get("content-type", "")
        is_small = int(headers.get("content-length", "0")) <= self._settings.max_body_bytes
        return caller.may({KeyScope.GENERATE}) and is_small and (not content_type or is_json(content_type))

    async def _read(self, receive: Receive, account: BodyAccount) -> tuple[bytes, bool]:
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

    async def _key(self, scope: Scope, body: bytes, tenant: str, memory: BodyMemory) -> RouteKey:
        """A body that cannot be read, or for which there is no memory, is refused where it is answered."""
        account, headers = memory.account(), Headers(scope=scope)
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

    async def _exchange(
        self,
        key: RouteKey,
        request: Forwarded,
        receive: Receive,
        answering: "_Answering",
        memory: BodyMemory,
        *,
        may_be_elsewhere: bool,
    ) -> None:
        """Pass on what is asked and what is answered, each as the other side takes it."""
        incoming: _Gone | None = None
        if request.is_whole:
            incoming = asyncio.ensure_future(_until_gone(receive))
        ending, account = asyncio.ensure_future(self._ending.wait()), memory.account()
        async with aclosing(self._engines.stream(key, request)) as messages:
            upcoming = asyncio.ensure_future(_begun(messages, _start_seconds(request.scope)))
            try:
                while True:
                    if answering.is_whole:  # then the server says that the client goes, and the replica ends by itself
                        await asyncio.wait({upcoming}, timeout=_END_SECONDS)
                        return
                    done, _ = await asyncio.wait(
                        set(filter(None, (upcoming, incoming, ending))),
                        return_when=asyncio.FIRST_COMPLETED,
                        timeout=_SILENT_SECONDS if answering.is_event_stream else None,
                    )
                    if not done:
                        raise ReplicaLostError("it says nothing any more")
                    if upcoming.done():
                        sent = upcoming.result()
                        if sent is None:
                            return
                        for message in sent:
                            if message["type"] == WANTS_BODY:
                                incoming = asyncio.ensure_future(_next_part(receive, account))
                            elif (
                                may_be_elsewhere
                                and message.get("status") == 404
                                and (found := best(await self._asked(request, incoming, is_one_enough=True)))
                            ):
                                await answering.all_of(found)
                                return
                            else:
                                await answering(message)
                        upcoming = asyncio.ensure_future(anext(messages, None))
                    if ending.done():
                        raise _STOPPING
                    if incoming is not None and incoming.done():
                        body, is_last = incoming.result()  # raises ClientDisconnect
                        incoming = asyncio.ensure_future(_until_gone(receive)) if is_last else None
                        await self._engines.feed(request.exchange_id, body, is_last=is_last)
                        account.close()
            finally:
                await _cancelled(upcoming, incoming, ending)
                account.close()

    async def _gather(self, how: Gathered, scope: Scope, receive: Receive, answering: "_Answering") -> None:
        """Ask all replicas, and answer once. Nothing that all are asked has a body: none is read."""
        request = Forwarded(scope_to_send(scope, request_id()), b"", True, uuid.uuid4().hex)
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            answers = await self._asked(request, gone, is_one_enough=is_of_one(how))
            if is_page(scope, how) and any(answer.status == 200 for answer in answers):
                whole_lists = {**request.scope, "query_string": ALL_OF_A_LIST}
                answers = await self._asked(replace(request, scope=whole_lists), gone, is_one_enough=False)
        finally:
            await _cancelled(gone)
        if not answers:
            raise _NONE
        await answering.all_of(how(answers, scope))

    async def _asked(self, request: Forwarded, gone: _Gone | None, *, is_one_enough: bool) -> list[Answer]:
        """What all replicas answer, or those that did before one had a good answer.

        Raises ClientDisconnect when the client goes, and RequestError when all ends.
        """
        of_all = replace(request, body=b"", is_whole=True, exchange_id=uuid.uuid4().hex)  # none has it already
        asking = asyncio.ensure_future(self._collected(of_all, is_one_enough=is_one_enough))
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait(set(filter(None, (asking, gone, ending))), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            if gone is not None and gone.done():
                gone.result()
            raise _STOPPING
        finally:
            await _cancelled(asking, ending)

    async def _collected(self, request: Forwarded, *, is_one_enough: bool) -> list[Answer]:
        found = []
        async with aclosing(self._engines.ask_all(request)) as answers:
            async for answer in answers:
                found.append(answer)
                if is_one_enough and answer.status < 300:
                    break
        return found

    async def _refuse(self, error: RequestError, scope: Scope, receive: Receive, answering: "_Answering") -> None:
        if answering.is_whole:
            return
        if not answering.has_begun:
            origin = Headers(scope=scope).get("origin")
            await error_response(error, self._early_headers(origin))(scope, receive, answering)
        elif answering.is_event_stream:
            path = scope["path"].removeprefix(self._settings.root_path)
            body = b"" if answering.has_said_all else last_event(path, error, answering.num_events)
            await answering({"type": "http.response.body", "body": body, "more_body": False})
        else:  # the client sees that it is not whole: the connection ends
            raise ConnectionAbortedError(error.message)


class _Answering:
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


async def _cancelled(*tasks: asyncio.Future[Any] | None) -> None:
    """All of them, which have ended when this returns."""
    for task in filter(None, tasks):
        task.cancel()
        with suppress(BaseException):
            await task


def _start_seconds(scope: Scope) -> float:
    """No longer than the client waits, where it says that so that it is understood."""
    try:
        told = float(Headers(scope=scope).get(TIMEOUT_HEADER, _START_SECONDS))
    except ValueError:
        return _START_SECONDS
    return min(told, _START_SECONDS) if told > 0 else _START_SECONDS


async def _begun(messages: AsyncGenerator[list[Message]], seconds: float) -> list[Message] | None:
    """The first of them. Raises RequestError where no replica takes the request in time."""
    try:
        return await asyncio.wait_for(anext(messages, None), seconds)
    except TimeoutError as error:
        raise _NONE from error


async def _next_part(receive: Receive, account: BodyAccount) -> tuple[bytes, bool]:
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


async def _until_gone(receive: Receive) -> tuple[bytes, bool]:
    """Raises ClientDisconnect when the client goes."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


async def _live(receive: Receive, send: Send) -> None:
    """The lifespan of an application that has none of its own."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def _whole(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
