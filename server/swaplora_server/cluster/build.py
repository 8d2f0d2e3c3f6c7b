"""The application for Ray Serve: `serve run swaplora_server.cluster.build:app base=... ray_replicas=1-4`.

Of this package `replica.py`, `ray_engines.py`, `router.py` and this file alone import Ray.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swaplora_server.access.key_ring import KeyRing
from swaplora_server.cluster.front.ingress import Ingress
from swaplora_server.cluster.ray_engines import RayEngines
from swaplora_server.cluster.replica import EngineReplica
from swaplora_server.config import Settings
from swaplora_server.log_lines import configure_logging
from swaplora_server.version import VERSION

ENGINE = "Engine"
INGRESS = "Ingress"
_MAX_ONGOING = 100_000  # each replica refuses by itself what is too much, and says when to ask again
_END_SECONDS = 10.0  # beyond the time to drain, for a replica's end
_STATS_SECONDS = 1.0
_HEALTH_SECONDS = 2.0  # three times in a row it must be found ill
_HANGS_SECONDS = 10.0
_NUM_INGRESSES = 2  # so that one may go


def app(args: dict[str, Any]) -> Any:
    """The whole application, of settings by name; those of the environment hold too. Raises ValueError."""
    settings = Settings(**{"ray": True, **args})
    check_replicas(settings)
    if not (settings.has_keys or settings.insecure_no_auth):
        raise ValueError(
            "key_file: Ray's proxies listen for other machines, so requests need a key: set key_file or api_key "
            "(SWAPLORA_API_KEY), or insecure_no_auth to let anyone in"
        )
    return behind_proxies(settings)


def check_replicas(settings: Settings) -> None:
    """Raise ValueError for more than one replica where each would have adapters of its own."""
    if settings.num_replicas[1] > 1 and settings.shared_store is None:
        raise ValueError(
            f"ray_replicas: {settings.ray_replicas}: more than one needs --shared-store, or an adapter that is put on "
            "one of them would be unknown to the others"
        )


class DeployError(Exception):
    """The replicas cannot be had; the message says why."""


@contextmanager
def deployed(settings: Settings) -> Iterator[Ingress]:
    """The ingress in front of replicas. Raises DeployError and KeyFileError.

    On a Ray of this machine alone they come and go with this. On a cluster they stay: other fronts may stand before
    them, and the next one of the same base finds them there.
    """
    try:
        check_replicas(settings)
        keys = key_ring(settings)
        handle = _deploy(settings)
    except (ValueError, RuntimeError, OSError, RayError, RayServeException) as error:
        ray.shutdown()
        raise DeployError(str(error)) from error
    keys.start()
    try:
        yield Ingress(settings, RayEngines(handle), keys)
    finally:
        keys.stop()
        if settings.ray_address is None:
            serve.shutdown()
        ray.shutdown()


def _deploy(settings: Settings) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {"include_dashboard": False} if settings.ray_address is None else {}
    ray.init(address=settings.ray_address or "local", configure_logging=False, **own)
    serve.start(proxy_location="Disabled")
    return serve.run(engines(settings), name=application_of(settings), route_prefix=None)


def application_of(settings: Settings) -> str:
    """What it is called on Ray Serve: replicas of another base are another application."""
    return f"swaplora-{re.sub(r'[^A-Za-z0-9._-]', '-', settings.base_id)}"


def engines(settings: Settings) -> Any:
    """The replicas, as a deployment that Ray Serve makes as many of as are needed."""
    fewest, most = settings.num_replicas
    concurrency = min(settings.max_num_seqs, settings.max_batch_tokens)
    scale: dict[str, Any] = {"num_replicas": fewest}
    if fewest != most:
        scale = {
            "autoscaling_config": {
                "min_replicas": fewest,
                "max_replicas": most,
                "target_ongoing_requests": max(1, concurrency // 2),
            }
        }
    deployment = serve.deployment(
        EngineReplica,
        name=ENGINE,
        max_ongoing_requests=_MAX_ONGOING,
        logging_config={"enable_access_log": False},  # a replica has a line of its own for each request
        graceful_shutdown_timeout_s=settings.drain_seconds + _END_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=_HANGS_SECONDS,
        request_router_config={
            "request_router_class": "swaplora_server.cluster.router.AdapterAffinityRouter",
            "request_routing_stats_period_s": _STATS_SECONDS,
        },
        ray_actor_options={
            "num_cpus": settings.ray_cpus or 1,
            "num_gpus": settings.ray_gpus or 0,
            "runtime_env": {"env_vars": {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "20000")}},
        },
        **scale,
    )
    # a change of their number alone, or of the front, is no reason to begin all of them again
    same = {"ray_replicas": None, "ray_address": None, "port": Settings.model_fields["port"].default}
    is_alone = most == 1 and settings.shared_store is None
    own = settings.model_copy(update=same)
    deployment = deployment.options(version=_version_of(own, is_alone), _internal=True)
    return deployment.bind(own, is_alone=is_alone)


def _version_of(settings: Settings, is_alone: bool) -> str:
    """The same for replicas that need not be begun anew: left to itself Ray Serve takes any two for different."""
    secrets = [key.get_secret_value() for key in settings.api_key]  # which settings do not show
    told = repr((VERSION, sorted(vars(settings).items()), secrets, is_alone))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def behind_proxies(settings: Settings) -> Any:
    """The replicas behind ingresses that Ray's own HTTP proxies call."""
    deployment = serve.deployment(
        serve.ingress()(_Ingress),
        name=INGRESS,
        num_replicas=_NUM_INGRESSES,
        max_ongoing_requests=_MAX_ONGOING,
        logging_config={"enable_access_log": False},  # a replica has a line of its own for each request
        graceful_shutdown_timeout_s=settings.drain_seconds + 2 * _END_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0.1},
    )
    return deployment.bind(settings, engines(settings))


class _Ingress:
    """The ingress as a deployment of its own."""

    def __init__(self, settings: Settings, handle: Any) -> None:
        configure_logging(settings.log_level, as_json=settings.log_json)
        self._settings = settings
        self._engines = RayEngines(handle)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        keys = key_ring(self._settings)
        keys.start()
        return _without_request_id(Ingress(self._settings, self._engines, keys))


def key_ring(settings: Settings) -> KeyRing:
    """Of the settings, for the ingress. Raises KeyFileError."""
    return KeyRing([key.get_secret_value() for key in settings.api_key], settings.key_file)


def _without_request_id(app: ASGIApp) -> ASGIApp:
    """`app`, whose answers have no X-Request-Id: Ray's proxy adds the same."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unnamed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message["headers"] if header[0].lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, send_unnamed)

    return answer
