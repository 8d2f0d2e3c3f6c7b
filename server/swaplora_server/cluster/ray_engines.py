"""The replicas, as the handle of a Ray Serve deployment reaches them."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import structlog
from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import RayServeException
from starlette.types import Message

from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.engines import ReplicaLostError
from swaplora_server.cluster.exchange import Answer, Forwarded
from swaplora_server.cluster.gathered import missing
from swaplora_server.cluster.replica import REPLICA, hear_front, take_part

ALL_SECONDS = 5.0  # that the replicas have to answer what all of them are asked: half of what Prometheus waits
_ALIVE_SECONDS = 3.0  # after which the replicas hear again that this front lives
_FEED_SECONDS = 30.0  # that a replica has to take the next of a body
_log = structlog.get_logger(__name__)


class RayEngines:
    """See `Engines`."""

    def __init__(self, handle: Any) -> None:
        """`handle` is a DeploymentHandle of `EngineReplica`."""
        self._handle = handle
        self._actors: dict[str, Any] = {}  # by exchange: whose body comes in parts
        self._name = uuid.uuid4().hex
        self._num_streams = 0
        self._replicas: dict[str, Any] = {}  # actors that have had a request, also those that end, by id
        self._telling: asyncio.Task[None] | None = None
        self._streaming = handle.options(stream=True, method_name="stream")

    async def stream(self, key: RouteKey, request: Forwarded) -> AsyncGenerator[list[Message]]:
        """See `Engines.stream`."""
        response, exchange_id = self._streaming.remote(key, replace(request, front=self._name)), request.exchange_id
        del request  # with a body that the front may want to keep no longer
        has_ended = False
        self._num_streams += 1
        if self._telling is None or self._telling.done():
            self._telling = asyncio.ensure_future(self._tell_alive())
        try:
            async for messages in response:
                if messages and messages[0]["type"] == REPLICA:
                    actor = self._actors[exchange_id] = messages.pop(0)["actor"]
                    self._replicas[actor._actor_id.hex()] = actor  # noqa: SLF001
                yield messages
            has_ended = True
        except (RayError, RayServeException) as error:
            has_ended = True
            raise ReplicaLostError(type(error).__name__) from error
        finally:
            self._num_streams -= 1
            self._actors.pop(exchange_id, None)
            if not has_ended:
                response.cancel()

    async def _tell_alive(self) -> None:
        """As long as anything is under way: a replica ends what a front has there that is not heard any more."""
        while self._num_streams:
            await asyncio.sleep(_ALIVE_SECONDS)
            await asyncio.gather(*(self._tell(*each) for each in self._replicas.items()))

    async def _tell(self, replica: str, actor: Any) -> None:
        try:
            await asyncio.wait_for(actor.__ray_call__.remote(hear_front, self._name), _ALIVE_SECONDS)
        except ActorDiedError:
            del self._replicas[replica]
        except Exception as error:  # noqa: BLE001 - it is said again
            _log.warning("a replica cannot be told that this front lives", reason=type(error).__name__)

    async def feed(self, exchange_id: str, body: bytes, *, is_last: bool) -> None:
        """See `Engines.feed`. Its actor is called itself: Ray Serve knows none that ends."""
        actor = self._actors.get(exchange_id)
        if actor is None:
            raise ReplicaLostError("no replica has the request")
        try:
            await asyncio.wait_for(actor.__ray_call__.remote(take_part, exchange_id, body, is_last), _FEED_SECONDS)
        except (RayError, TimeoutError) as error:
            raise ReplicaLostError(type(error).__name__) from error

    async def ask_all(self, request: Forwarded) -> AsyncGenerator[Answer]:
        """See `Engines.ask_all`."""
        try:
            # with Ray's own `results_async` one that is late leaves nothing of the others
            sent = await self._handle.broadcast("answer", request)._fetch_replica_results_async()  # noqa: SLF001
        except (RayError, RayServeException) as error:
            _log.warning("no replica can be asked", reason=type(error).__name__)
            return
        asked = [asyncio.ensure_future(_in_time(each)) for each in sent]
        try:
            for answered in asyncio.as_completed(asked):
                yield await answered
        finally:
            for task in asked:
                task.cancel()


async def _in_time(result: Any) -> Answer:
    """What a replica answers, or that it is late or fails."""
    has_ended = False
    try:
        answer: Answer = await asyncio.wait_for(result.get_async(), ALL_SECONDS)
        has_ended = True
    except (RayError, RayServeException, TimeoutError) as error:
        _log.warning("a replica did not answer", reason=type(error).__name__)
        return missing()
    else:
        return answer
    finally:
        if not has_ended:
            result.cancel()
