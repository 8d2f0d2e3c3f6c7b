"""Running the server: listen at once, load in the background, drain and exit cleanly when told to."""

import asyncio
import gc
import logging
import os
import resource
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from types import FrameType

import structlog
import uvicorn
from rich.console import Console
from uvicorn.loops.auto import auto_loop_factory

from swaplora_adapters.errors import AdapterError
from swaplora_adapters.store.store import StoreError
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
from swaplora_server.log_lines import LineFormatter, indented_traceback, show_values
from swaplora_server.service.offload import in_own_thread
from swaplora_server.service.service import Service
from swaplora_server.service.tracing.provider import TracingError

# beyond the time that running requests get, for what they are told at its end, and for the last bytes to go out
_LAST_ANSWERS_SECONDS = 1
_LAST_BYTES_SECONDS = 5


class StartError(RuntimeError):
    """The server cannot start; the message says why and what to do."""


def run(settings: Settings) -> None:
    """Serve until told to stop. Raises StartError."""
    configure_logging(settings)
    _allow_files(settings)
    try:
        service = Service(settings)
    except (KeyFileError, AuditLogError, TracingError) as error:
        raise StartError(str(error)) from error
    with _listen(settings) as listener, asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        has_ended = runner.run(_serve(service, listener))
    if not has_ended:
        _leave()


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
    server = _Server(service)
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


class _Server(uvicorn.Server):
    """uvicorn's server, which on a first signal lets requests end and on a second does not."""

    def __init__(self, service: Service) -> None:
        grace_seconds = int(service.settings.drain_seconds) + _LAST_BYTES_SECONDS + 1
        app = create_app(service, BodyMemory(service.settings.body_memory_bytes))
        self._http = HttpConfig(app, service.settings, grace_seconds)
        super().__init__(self._http)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests; when the time to drain is over, or at a second signal, end what still runs."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._service.is_draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        deadline = asyncio.create_task(self._end_in_time())
        await super().shutdown(sockets)
        deadline.cancel()

    async def _end_in_time(self) -> None:
        """Tell all whose request runs or waits, and then those whose request is not here yet."""
        await asyncio.sleep(self._service.settings.drain_seconds)
        stopping = asyncio.create_task(in_own_thread(self._service.stop))
        await asyncio.sleep(_LAST_ANSWERS_SECONDS)
        self._http.connections.refuse_unanswered()
        await stopping


def configure_logging(settings: Settings) -> None:
    """Log lines on stderr, for people or as JSON; what libraries log goes through the same lines."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        show_values,
    ]
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=indented_traceback)
    as_json = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*shared, *(as_json if settings.log_json else [plain])],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    library_lines = logging.StreamHandler()
    library_lines.setFormatter(LineFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[library_lines])


def _show(service: Service, listener: socket.socket, seconds: float) -> None:
    settings = service.settings
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{listener.getsockname()[1]}"
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


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); "
            "stop what does, or choose another --port"
        ) from error
