"""A request on its way to a replica, or to the next one, and its answer on the way back."""

import asyncio
import math
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import structlog
from starlette.types import Message, Receive

from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.engines import Engines, ReplicaLostError
from swaplora_server.cluster.exchange import WANTS_BODY, Answer, Forwarded
from swaplora_server.cluster.front.answering import Answering, cancelled
from swaplora_server.cluster.front.bodies import next_part, until_gone
from swaplora_server.cluster.front.tries import ASKING, Tries, may_repeat
from swaplora_server.engine.request import OVERDUE, OVERDUE_CODE
from swaplora_server.http.sse import PING_SECONDS
from swaplora_server.http.tasks import TIMEOUT_HEADER
from swaplora_server.http.transport.body_memory import BodyAccount
from swaplora_server.service.errors import RequestError

SILENT_SECONDS = 3 * PING_SECONDS  # of a stream's replica, after which it hangs
STOPPING = RequestError("draining", "the server is shutting down")
NONE = RequestError("not_ready", "no replica can take the request yet; GET /health/ready says when one can")
_END_SECONDS = 1.0  # that a replica may take to end once all is said
_LATE_SECONDS = 1.0  # in which a replica says itself that the time is over, which it began to count later
_LEAST_SECONDS = 0.001  # that a replica is given: none at all it would call malformed
_OVERDUE = RequestError(OVERDUE_CODE, OVERDUE)
_UNWELL = 503  # of all that a replica may answer, what another may not
_TIMEOUT = TIMEOUT_HEADER.lower().encode()
Gone = asyncio.Task[tuple[bytes, bool]]  # which ends when the client goes, if there is nothing more to come of it
Elsewhere = Callable[[Forwarded, Gone | None], Awaitable[Answer | None]]
_log = structlog.get_logger(__name__)


class _UnwellError(Exception):
    """A replica says that it cannot answer, and nothing of that is passed on yet."""


class Passage:
    """Of one request. Belongs to the event loop.

    What may be repeated is given to the next replica by rank when one does not take it in time, is lost or is not well,
    as long as nothing is answered; so is what comes in parts, as long as no replica has asked for the first.
    """

    def __init__(
        self,
        engines: Engines,
        key: RouteKey,
        request: Forwarded,
        account: BodyAccount,
        receive: Receive,
        answering: Answering,
        *,
        path: str,
        elsewhere: Elsewhere | None,
    ) -> None:
        """`account` is for the body, and closed by whoever made it; `path` is that below the root path.

        `elsewhere` asks all replicas for what one does not find; None where no other can have it.
        """
        self._engines = engines
        self._key = replace(key, tried=[])
        self._request = request
        self._account = account
        self._receive = receive
        self._answering = answering
        self._may_repeat = may_repeat(request.scope["method"], path) or self._is_nothing_without_body
        self._elsewhere = elsewhere
        self._tries = Tries(request.scope)
        self._is_timed = request.scope["method"] == "POST" and path in ASKING
        self._is_had = False  # by the replica that is asked now
        self._incoming: Gone | None = None

    async def run(self, ending: asyncio.Future[Any]) -> None:
        """Until all is answered, or `ending`. Raises ClientDisconnect, ReplicaLostError and RequestError."""
        if self._request.is_whole:
            self._incoming = asyncio.ensure_future(until_gone(self._receive))
        try:
            while True:
                try:
                    return await self._try(ending)
                except _UnwellError:
                    reason = f"it answers {_UNWELL}"
                except TimeoutError as error:
                    if not self._has_another():
                        is_overdue = self._is_timed and self._tries.seconds_left <= 0
                        raise (_OVERDUE if is_overdue else NONE) from error
                    reason = "it does not take the request"
                except ReplicaLostError as error:
                    if not self._has_another():
                        raise
                    reason = str(error)
                _log.warning("the next replica is asked", reason=reason)
                self._prepare()
        finally:
            await cancelled(self._incoming)

    @property
    def _is_nothing_without_body(self) -> bool:
        """Whether a replica that has none of the body can have done nothing."""
        return not self._request.is_whole and self._request.scope["method"] == "PUT"

    def _has_another(self) -> bool:
        """Whether the request may be given to another when the one that is asked now fails."""
        return not self._answering.has_begun and self._may_repeat and self._tries.has_another(was_had=self._is_had)

    def _prepare(self) -> None:
        """The request as the next one gets it: with an id of its own, and the time that is left.

        A time that is none stays what it is: the next one refuses it as well.
        """
        self._tries.count(was_had=self._is_had)
        self._is_had = False
        scope, seconds = self._request.scope, self._tries.seconds_left
        if seconds < math.inf:
            left = b"%.3f" % max(seconds, _LEAST_SECONDS)
            headers = [(name, left if name == _TIMEOUT else value) for name, value in scope["headers"]]
            scope = {**scope, "headers": headers}
        self._request = replace(self._request, scope=scope, exchange_id=uuid.uuid4().hex)

    async def _try(self, ending: asyncio.Future[Any]) -> None:
        """Pass on what is asked and what is answered, each as the other side takes it."""
        seconds = self._tries.start_seconds(may_repeat=self._may_repeat)
        async with aclosing(self._engines.stream(self._key, self._request)) as messages:
            upcoming = asyncio.ensure_future(asyncio.wait_for(anext(messages, None), seconds))
            try:
                while not self._answering.is_whole:
                    await self._wait(upcoming, ending)
                    if upcoming.done():
                        if (sent := upcoming.result()) is None:
                            raise ReplicaLostError("it ends, and its answer is not whole")
                        await self._pass_on(sent)
                        upcoming = asyncio.ensure_future(anext(messages, None))
                    if ending.done():
                        raise STOPPING
                    if self._incoming is not None and self._incoming.done():
                        await self._feed(*self._incoming.result())
                # the server says now that the client goes, and the replica ends by itself
                await asyncio.wait({upcoming}, timeout=_END_SECONDS)
            finally:
                await cancelled(upcoming)

    async def _wait(self, upcoming: asyncio.Future[Any], ending: asyncio.Future[Any]) -> None:
        """What is here was made in time, however late the client takes what was before it."""
        seconds = SILENT_SECONDS if self._answering.is_event_stream else math.inf
        if self._is_timed:
            seconds = min(seconds, self._tries.seconds_left + _LATE_SECONDS)
        done, _ = await asyncio.wait(
            set(filter(None, (upcoming, ending, self._incoming))),
            return_when=asyncio.FIRST_COMPLETED,
            timeout=None if seconds == math.inf else max(0.0, seconds),
        )
        if self._is_timed and not upcoming.done() and self._tries.seconds_left <= -_LATE_SECONDS:
            raise _OVERDUE
        if not done:
            raise ReplicaLostError("it says nothing any more")

    async def _pass_on(self, sent: list[Message]) -> None:
        self._is_had = True
        if not self._may_repeat:
            self._release()
        for message in sent:
            if message["type"] == WANTS_BODY:
                self._may_repeat = False  # what is read now is not here for another
                self._incoming = asyncio.ensure_future(next_part(self._receive, self._account))
            elif message.get("status") == _UNWELL and self._has_another():
                raise _UnwellError
            elif message.get("status") == 404 and (found := await self._found_elsewhere()) is not None:
                await self._answering.all_of(found)
                return
            else:
                await self._answering(message)
                if self._request.body:
                    self._release()

    async def _found_elsewhere(self) -> Answer | None:
        return None if self._elsewhere is None else await self._elsewhere(self._request, self._incoming)

    async def _feed(self, body: bytes, is_last: bool) -> None:
        self._incoming = asyncio.ensure_future(until_gone(self._receive)) if is_last else None
        await self._engines.feed(self._request.exchange_id, body, is_last=is_last)
        self._release()

    def _release(self) -> None:
        """The replica has what is here of the body, and no other is to have it."""
        self._request = replace(self._request, body=b"")
        self._account.close()
