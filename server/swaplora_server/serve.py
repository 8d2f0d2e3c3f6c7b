"""Running the server: listen at once, load in the background, drain and exit cleanly when told to."""

import asyncio
import gc
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType

import structlog
from rich.console import Console
from starlette.types import ASGIApp
from uvicorn.loops.auto import auto_loop_factory

from swaplora_adapters.errors import AdapterError
from swaplora_adapters.files.disk import StoreError
from swaplora_server.access.audit import AuditLogError
from swaplora_server.access.key_file import KeyFileError
from swaplora_server.banner import Progress, show_banner
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.config import Settings
from swaplora_server.embedded import EmbeddedBaseError
from swaplora_server.http.app import create_app
from swaplora_server.http.transport.body_memory import BodyMemory
from swaplora_server.http.transport.connections import num_allowed
from swaplora_server.http.transport.protocol import HttpConfig
from swaplora_server.http.transport.server import HttpServer
from swaplora_server.log_lines import configure_logging
from swaplora_server.service.offload import in_own_thread
from swaplora_server.service.service import Service
from swaplora_server.service.tracing.provider import TracingError

# beyond the time that running requests get, for what they are told at its end, and for the last bytes to go out
_LAST_ANSWERS_SECONDS = 1
_LAST_BYTES_SECONDS = 5
_log = structlog.get_logger(__name__)


class StartError(RuntimeError):
    """The server cannot start; the message says why and what to do."""


def run(settings: Settings) -> None:
    """Serve until told to stop. Raises StartError."""
    configure_logging(settings.log_level, as_json=settings.log_json)
    _allow_files(settings)
    if settings.ray:
        _run_in_front(settings)
        return
    try:
        service = Service(settings)
    except (KeyFileError, AuditLogError, TracingError) as error:
        raise StartError(str(error)) from error
    with _listen(settings) as listener, asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        if not runner.run(_serve(service, listener)):
            _leave()  # the runner's own end would wait for the loop's threads


def _run_in_front(settings: Settings) -> None:
    """Serve what replicas on Ray Serve answer. Raises StartError."""
    try:
        from swaplora_server.cluster.build import DeployError, deployed
    except ModuleNotFoundError as error:
        raise StartError("ray: Ray is not installed: pip install 'swaplora[ray]', or leave --ray out") from error
    with _listen(settings) as listener:
        try:
            with deployed(settings) as app, asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
                end_all = partial(runner.get_loop().call_soon_threadsafe, app.end_all)
                server = _Server(app, settings, app.drain, end_all)
                fewest, most = settings.num_replicas
                replicas = f"{fewest}" if fewest == most else f"{fewest} to {most}"
                _log.info("serving with replicas on Ray", url=_url(settings, listener), replicas=replicas)
                runner.run(server.serve(sockets=[listener]))
        except (DeployError, KeyFileError) as error:
            raise StartError(str(error)) from error


def _leave() -> None:
    """End the process under a thread that is still at work: the interpreter's own end could crash within a library."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _allow_files(settings: Settings) -> None:
    """Have as many open files as the system lets us: a connection is one. Raises StartError if that is too few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # as it is, where the system names a limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted, allowed = settings.max_connections or 0, num_allowed()
    if wanted > allowed:
        raise StartError(
            f"max_connections: the system's limit of open files has room for {allowed} connections, not {wanted}; "
            "raise it (ulimit -n) or lower --max-connections"
        )


async def _serve(service: Service, listener: socket.socket) -> bool:
    """Whether all has ended with it: not so a start that takes longer than was waited for, or a step that hangs."""
    began = time.monotonic()
    app = create_app(service, BodyMemory(service.settings.body_memory_bytes))
    server = _Server(app, service.settings, partial(setattr, service, "is_draining", True), service.stop)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        with Progress() as progress:
            starting = asyncio.create_task(in_own_thread(partial(service.start, progress.step)))
            await asyncio.wait({starting, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # told to stop before it was done: nothing is lost with it
            return False
        starting.result()
        gc.freeze()  # the collector need not go through what stays for good: a step would wait for it
    except (UnsupportedModelError, EmbeddedBaseError, AdapterError, StoreError, OSError, ValueError) as error:
        raise StartError(str(error)) from error
    else:
        if not service.is_draining:
            _show(service, listener, time.monotonic() - began)
        await serving
    finally:
        server.should_exit = True
        await serving
        await in_own_thread(service.stop)
    return service.has_ended


class _Server(HttpServer):
    """A server which on a first signal lets requests end and on a second does not."""

    def __init__(
        self, app: ASGIApp, settings: Settings, begin_to_drain: Callable[[], None], end_all: Callable[[], object]
    ) -> None:
        """`begin_to_drain` is called at the first signal; `end_all` tells all requests of the app when time is up."""
        grace_seconds = int(settings.drain_seconds) + _LAST_BYTES_SECONDS + 1
        super().__init__(HttpConfig(app, settings, grace_seconds))
        self._drain_seconds = settings.drain_seconds
        self._begin_to_drain = begin_to_drain
        self._end_all = end_all

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests; when the time to drain is over, or at a second signal, end what still runs."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._begin_to_drain()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        deadline = asyncio.create_task(self._end_in_time())
        await super().shutdown(sockets)
        deadline.cancel()

    async def _end_in_time(self) -> None:
        """Tell all whose request runs or waits, and then those whose request is not here yet."""
        await asyncio.sleep(self._drain_seconds)
        stopping = asyncio.create_task(in_own_thread(self._end_all))
        await asyncio.sleep(_LAST_ANSWERS_SECONDS)
        self._http.connections.refuse_unanswered()
        await stopping


def _show(service: Service, listener: socket.socket, seconds: float) -> None:
    settings = service.settings
    url = _url(settings, listener)
    show_banner(
        Console(stderr=True),
        url=url,
        page=f"{url}/ui" if settings.ui else None,
        base=settings.base_id,
        device=service.base.device.type,
        kernels=service.base.backend.description,
        memory=service.memory_plan(),
        adapters=[named.current.name for named in service.registry.names.index.all()],
        seconds=seconds,
    )


def _url(settings: Settings, listener: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); "
            "stop what does, or choose another --port"
        ) from error
