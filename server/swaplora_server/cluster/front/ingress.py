"""The ingress: plain ASGI in front of the replicas. It parses nothing but who is to answer, and changes no answer."""

import asyncio
import re
import uuid
from contextlib import aclosing
from dataclasses import replace

import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from swaplora_server.access.caller import Caller
from swaplora_server.access.key_ring import KeyRing
from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.engines import Engines, ReplicaLostError
from swaplora_server.cluster.exchange import Answer, Forwarded, scope_to_send
from swaplora_server.cluster.front.answering import Answering, cancelled
from swaplora_server.cluster.front.bodies import Bodies, has_body, until_gone
from swaplora_server.cluster.front.lost import last_event
from swaplora_server.cluster.front.passage import NONE, STOPPING, Gone, Passage
from swaplora_server.cluster.front.route_key import ANYWHERE, key_of_path
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
from swaplora_server.config import Settings
from swaplora_server.http.auth import given_key
from swaplora_server.http.dependencies import request_id
from swaplora_server.http.errors import error_response
from swaplora_server.http.transport.body_memory import BodyAccount
from swaplora_server.http.transport.browsers import Pages
from swaplora_server.http.transport.request_id import RequestIdMiddleware
from swaplora_server.service.errors import RequestError

_LOST = RequestError(
    "engine_failed", "the replica that was answering this request has gone; ask again", retry_seconds=1
)
_FAILED = RequestError("internal_error", "the server failed to answer this request")
_OF_ONE = re.compile(r"/v1/adapters/[^/]+")  # what one replica alone may know of yet: an adapter on its way
_log = structlog.get_logger(__name__)


class Ingress:
    """The whole HTTP surface of the replicas. Belongs to the event loop."""

    def __init__(self, settings: Settings, engines: Engines, keys: KeyRing) -> None:
        """`keys` are those of the settings: whose a request is, others decide."""
        self._settings = settings
        self._engines = engines
        self._keys = keys
        self._bodies = Bodies(settings)
        self._pages = Pages(settings)
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
        answering = Answering(send)
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        path, caller = scope["path"].removeprefix(self._settings.root_path), self._caller(scope)
        account = self._bodies.of(caller).account()
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            if self._is_draining and (scope["method"] not in ("GET", "HEAD") or path in READY):
                raise STOPPING
            how = gathered_as(scope["method"], path)
            if how is not None and (caller is not None or path in HEALTH):
                await self._gather(how, scope, receive, answering)
                return
            is_about_one = scope["method"] in ("GET", "HEAD", "DELETE") and _OF_ONE.fullmatch(path) is not None
            passage = Passage(
                self._engines,
                *await self._routed(scope, path, caller, receive, account),
                account,
                receive,
                answering,
                path=path,
                elsewhere=self._elsewhere if is_about_one and caller is not None else None,
            )
            await passage.run(ending)
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
            await cancelled(ending)
            account.close()

    def _caller(self, scope: Scope) -> Caller | None:
        """Whose request it is; None for a key that is not good, with which nothing is read."""
        return self._keys.find(given_key(Headers(scope=scope)))

    async def _routed(
        self, scope: Scope, path: str, caller: Caller | None, receive: Receive, account: BodyAccount
    ) -> tuple[RouteKey, Forwarded]:
        """A request as it is sent, and where it is best answered. Nothing of its body stays but that."""
        tenant = "" if caller is None else caller.tenant
        key, body, is_whole = key_of_path(path, tenant), b"", not has_body(scope)
        if self._bodies.is_read(scope, caller):
            body, is_whole = await self._bodies.read(receive, account)
            if is_whole and key == ANYWHERE:
                key = await self._bodies.key(scope, body, tenant, self._bodies.of(caller).account())
        return key, Forwarded(scope_to_send(scope, request_id()), body, is_whole, uuid.uuid4().hex)

    async def _elsewhere(self, request: Forwarded, gone: Gone | None) -> Answer | None:
        """The best that any replica answers."""
        return best(await self._asked(request, gone, is_one_enough=True))

    async def _gather(self, how: Gathered, scope: Scope, receive: Receive, answering: Answering) -> None:
        """Ask all replicas, and answer once. Nothing that all are asked has a body: none is read."""
        request = Forwarded(scope_to_send(scope, request_id()), b"", True, uuid.uuid4().hex)
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            answers = await self._asked(request, gone, is_one_enough=is_of_one(how))
            if is_page(answers, scope, how):
                whole_lists = {**request.scope, "query_string": ALL_OF_A_LIST}
                answers = await self._asked(replace(request, scope=whole_lists), gone, is_one_enough=False)
        finally:
            await cancelled(gone)
        if not answers:
            raise NONE
        await answering.all_of(how(answers, scope))

    async def _asked(self, request: Forwarded, gone: Gone | None, *, is_one_enough: bool) -> list[Answer]:
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
            raise STOPPING
        finally:
            await cancelled(asking, ending)

    async def _collected(self, request: Forwarded, *, is_one_enough: bool) -> list[Answer]:
        found = []
        async with aclosing(self._engines.ask_all(request)) as answers:
            async for answer in answers:
                found.append(answer)
                if is_one_enough and answer.status < 300:
                    break
        return found

    async def _refuse(self, error: RequestError, scope: Scope, receive: Receive, answering: Answering) -> None:
        if answering.is_whole:
            return
        if not answering.has_begun:
            origin = Headers(scope=scope).get("origin")
            await error_response(error, self._pages.early_headers(origin))(scope, receive, answering)
        elif answering.is_event_stream:
            path = scope["path"].removeprefix(self._settings.root_path)
            body = b"" if answering.has_said_all else last_event(path, error, answering.num_events)
            await answering({"type": "http.response.body", "body": body, "more_body": False})
        else:  # the client sees that it is not whole: the connection ends
            raise ConnectionAbortedError(error.message)


async def _live(receive: Receive, send: Send) -> None:
    """The lifespan of an application that has none of its own."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
