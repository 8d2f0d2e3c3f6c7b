"""A replica: the engine and the whole application within one Ray actor, without a connection of its own."""

import asyncio
import gc
from collections.abc import AsyncGenerator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import structlog
from filelock import FileLock, Timeout
from ray import serve
from starlette.types import Message
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn

from swaplora_adapters.registry.index import parse_reference
from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.exchange import Answer, Exchanges, Forwarded, whole_answer
from swaplora_server.cluster.gathered import labelled
from swaplora_server.cluster.meter import INTERFACE, CommonMeter, SharedMeter
from swaplora_server.config import Settings
from swaplora_server.http.app import create_app
from swaplora_server.http.transport.body_memory import BodyMemory
from swaplora_server.log_lines import configure_logging
from swaplora_server.service.offload import in_own_thread
from swaplora_server.service.service import Service

MAX_ON_A_NODE = 64
REPLICA = "swaplora.replica"  # a message beside ASGI's: the actor that has the request
_LOOK_SECONDS = 1.0
_HANDOVER_SECONDS = 60.0  # beyond the time to drain, that a replica before this one may take to leave its folder
_here: list["EngineReplica"] = []  # the one of this process
_log = structlog.get_logger(__name__)


class EngineReplica:
    """What Ray Serve makes one of for each replica, and asks. All of it on one event loop."""

    async def __init__(self, settings: Settings, *, is_alone: bool) -> None:  # type: ignore[misc]  # Ray Serve waits for it
        """Returns when requests can be answered. Raises what `Service.start` does.

        `is_alone` says that there is never another, whose data directory must be another as well.
        """
        configure_logging(settings.log_level, as_json=settings.log_json)
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._folder, self._lock = await asyncio.to_thread(claim_folder, settings, is_alone=is_alone)
        self._service = Service(settings.model_copy(update={"data_dir": self._folder}))
        self._meter = self._service.meter = SharedMeter(self._id, partial(common_meter, context.app_name))
        if settings.key_file is not None:  # where limits stand
            await self._meter.prepare()
        await in_own_thread(partial(self._service.start, _report))
        gc.freeze()
        app = create_app(self._service, BodyMemory(settings.body_memory_bytes))
        self._exchanges = Exchanges(app)
        self._num_told = 0
        self._loop = asyncio.get_running_loop()
        _here.append(self)
        self._lifespan = LifespanOn(Config(app, lifespan="on", log_config=None))
        await self._lifespan.startup()
        self._looking = asyncio.ensure_future(self._look_at_fronts())

    async def stream(self, key: RouteKey, request: Forwarded) -> AsyncGenerator[list[Message]]:
        """See `Engines.stream`. Who brings the rest of the body hears first which actor has the request.

        So does a front that does not say yet that it lives: it is to tell the actor itself, as Ray Serve knows none
        that ends.
        """
        if len(getattr(key, "tried", ())) > 1:  # a front of the release before does not say
            self._service.metrics.count_retried()
        messages = self._exchanges.stream(request)
        try:
            if not request.is_whole or self._exchanges.is_unheard(request.front):
                await anext(messages)
                yield [{"type": REPLICA, "actor": ray.get_runtime_context().current_actor}]
            async for sent in messages:
                yield sent
        finally:
            await messages.aclose()

    def feed(self, exchange_id: str, body: bytes, *, is_last: bool) -> None:
        """See `Engines.feed`; of any thread."""
        self._loop.call_soon_threadsafe(partial(self._exchanges.feed, exchange_id, body, is_last=is_last))

    def hear(self, front: str) -> None:
        """A front that has something under way lives; of any thread."""
        self._loop.call_soon_threadsafe(self._exchanges.hear, front)

    async def _look_at_fronts(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self._exchanges.look_at_fronts()

    async def answer(self, request: Forwarded) -> Answer:
        """See `Engines.ask_all`."""
        return labelled(await whole_answer(self._exchanges, request, self._id))

    def record_routing_stats(self) -> dict[str, Any]:
        """For the router, every now and then: what is in memory by stored name, and how much there is to do."""
        self._meter.tell_alive()
        service = self._service
        snapshot = service.engine.snapshot()
        if snapshot.num_waiting or snapshot.num_running:
            self._num_told += 1
        resident = {state.name for state in service.registry.states() if state.tier == "device"}
        index = service.registry.names.index
        for alias in (*index.aliases(), *index.mixtures()):
            if all(parse_reference(target.reference).name in resident for target in alias.targets):
                resident.add(alias.alias)
        return {
            "resident": sorted(resident),
            "queue": snapshot.num_waiting,
            "running": snapshot.num_running,
            "capacity": service.max_rows,
            "is_ready": service.is_ready,
            "told": self._num_told,  # so that the same again is news, or a router would take it for what it has
        }

    def check_health(self) -> None:
        """Raise RuntimeError for an engine that has failed or hangs: Ray Serve then has another replica instead."""
        if not self._service.is_healthy:
            raise RuntimeError("the engine has failed")

    async def __del__(self) -> None:
        """What Ray Serve calls when no request runs any more."""
        if "_lifespan" in vars(self):
            self._looking.cancel()
            await self._lifespan.shutdown()
            await in_own_thread(self._service.stop)
            self._lock.release()


def take_part(_actor: Any, exchange_id: str, body: bytes, is_last: bool) -> None:
    """Called within a replica's actor: the next of a body. A request that has ended needs none."""
    _here[0].feed(exchange_id, body, is_last=is_last)


def hear_front(_actor: Any, front: str) -> None:
    """Called within a replica's actor: a front lives."""
    _here[0].hear(front)


def _report(step: str) -> None:
    _log.info("starting", step=step)


def common_meter(application: str) -> Any:
    """The one that counts for all replicas of an application and a release: whoever asks first makes it.

    It outlives them: those that speak with it in another way have another.
    """
    actor = ray.remote(CommonMeter).options(
        name=f"meter-{application}-{version('swaplora')}-{INTERFACE}",
        namespace="swaplora",
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
    )
    return actor.remote()


def claim_folder(settings: Settings, *, is_alone: bool) -> tuple[Path, FileLock]:
    """A data directory of this replica's own, which the next one takes over: what lies there need not come again.

    One that is alone has the configured one, others the first below it that no replica of this node has.
    Raises RuntimeError.
    """
    data_dir = settings.data_dir
    data_dir.mkdir(parents=True, exist_ok=True)
    if is_alone:
        lock = FileLock(data_dir / "replica.lock")
        lock.acquire(timeout=settings.drain_seconds + _HANDOVER_SECONDS)
        return data_dir, lock
    for number in range(MAX_ON_A_NODE):
        folder = data_dir / f"replica-{number}"
        lock = FileLock(data_dir / f"{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        folder.mkdir(exist_ok=True)
        return folder, lock
    raise RuntimeError(f"data_dir: {MAX_ON_A_NODE} replicas on this node have their folders there already")
