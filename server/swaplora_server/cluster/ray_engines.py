"""The replicas, as the handle of a Ray Serve deployment reaches them."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import ray
import structlog
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.types import Message

from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.engines import ReplicaLostError
from swaplora_server.cluster.exchange import Answer, Forwarded

ALL_SECONDS = 10.0  # that the replicas have to answer what all of them are asked
_log = structlog.get_logger(__name__)


class RayEngines:
    """See `Engines`."""

    def __init__(self, handle: Any) -> None:
        """`handle` is a DeploymentHandle of `EngineReplica`."""
        self._handle = handle
        self._streaming = handle.options(stream=True, method_name="stream")

    async def stream(self, key: RouteKey, request: Forwarded) -> AsyncGenerator[list[Message]]:
        """See `Engines.stream`."""
        response = self._streaming.remote(key, request)
        has_ended = False
        try:
            async for messages in response:
                yield messages
            has_ended = True
        except (RayError, RayServeException) as error:
            has_ended = True
            raise ReplicaLostError(type(error).__name__) from error
        finally:
            if not has_ended:
                response.cancel()

    async def feed(self, exchange_id: str, body: bytes, *, is_last: bool) -> None:
        """See `Engines.feed`: one of them alone fetches what is in the list."""
        await self._each("feed", exchange_id, [ray.put(body)], is_last)

    async def ask_all(self, request: Forwarded) -> list[Answer]:
        """See `Engines.ask_all`."""
        return [each for each in await self._each("answer", request) if isinstance(each, Answer)]

    async def _each(self, method: str, *args: Any) -> list[Any]:
        """What each of them returns, in time."""
        # with Ray's own `results_async` one that is late leaves nothing of the others
        sent = await self._handle.broadcast(method, *args)._fetch_replica_results_async()  # noqa: SLF001
        waited = (asyncio.wait_for(each.get_async(), ALL_SECONDS) for each in sent)
        found = await asyncio.gather(*waited, return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException):
                _log.warning("a replica did not answer", method=method, reason=type(each).__name__)
        return [each for each in found if not isinstance(each, BaseException)]
