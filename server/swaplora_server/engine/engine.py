"""The engine thread: continuous batching. It takes commands, and while there is work runs: schedule, run, commit."""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from weakref import WeakSet

import structlog

from swaplora_server.engine.probe import run_probe
from swaplora_server.engine.request import Request
from swaplora_server.engine.row_faults import run_bisecting
from swaplora_server.engine.runner import StepRunner
from swaplora_server.engine.scheduling.batch import Batch, Sampled
from swaplora_server.engine.scheduling.scheduler import Scheduler
from swaplora_server.engine.snapshot import Snapshot
from swaplora_server.watchdog import Watchdog

_IDLE_BEAT_SECONDS = 1.0
_HELD_SECONDS = 0.001  # between two looks at whether a sequence can be run, where none can
STOPPING = ("the server is shutting down", "draining")  # what those hear whom its end leaves: the message, and its code
STEP_SECONDS = 300.0  # that a step may take, unless the settings say otherwise
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request before its time, or one of its sequences."""

    request: Request
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Command = Submit | Abort | Stop


class Engine:
    """One thread that owns the scheduler, the KV cache and the model. Everyone else sends it small commands.

    A request that was submitted is the engine's: it ends exactly once, and the engine calls its `release`. What a
    request makes fail ends that request; the engine itself ends only of what fails without any, and of a step that
    takes more than `max_step_seconds`, which nobody waits for any longer.
    """

    def __init__(self, scheduler: Scheduler, runner: StepRunner, max_step_seconds: float = STEP_SECONDS) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._max_step_seconds = max_step_seconds
        self._requests: WeakSet[Request] = WeakSet()  # that were submitted; those that have ended go with their owners
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._is_stopping = False
        self._lock = threading.Lock()  # between a command and the thread's last look at its inbox
        self.failure: str | None = None
        self._farewell = STOPPING
        self._last_beat = time.monotonic()
        self._watchdog = Watchdog(lambda: self._last_beat, max_step_seconds, self._on_stuck)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def snapshot(self) -> Snapshot:
        """How it stands now. Any thread may ask; what is counted between two steps fits together, during one nearly."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        return Snapshot(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._inbox.qsize(),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached_blocks,
            num_looked_up_tokens=scheduler.cache.num_looked_up_tokens,
            num_hit_tokens=scheduler.cache.num_hit_tokens,
            num_failed_requests=scheduler.num_failed,
            num_preempted=scheduler.num_preempted,
            block_size=pool.block_size,
            num_steps=dict(self._runner.num_steps),
        )

    def hurrying_last(self, is_held_up: Callable[[], bool]) -> AbstractContextManager[None]:
        """Meanwhile the last priority has all of a step if this says that another waits for memory it may hold."""
        return self._scheduler.background.hurried_while(is_held_up)

    def start(self) -> None:
        self._last_beat = time.monotonic()
        self._thread.start()
        self._watchdog.start()

    def stop(self, seconds: float | None = None) -> None:
        """End what still runs with an error, and the thread with it, which is waited for no more than `seconds`."""
        self._send(Stop())
        if self._thread.is_alive():
            self._thread.join(seconds)
        if self._thread.is_alive():
            self._give_up()
        self._watchdog.stop()

    @property
    def has_ended(self) -> bool:
        """Whether its thread has, or never began."""
        return not self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Hand a request over. On a stopped engine it ends at once with an error event."""
        if not self._send(Submit(request)):
            request.give_up(*self._farewell)

    def abort(self, request: Request, index: int | None = None) -> None:
        """End the request, or one sequence of it, before the next step. Harmless when it has ended already."""
        self._send(Abort(request, index))

    def _send(self, command: Command) -> bool:
        """Whether the thread will still obey `command`."""
        with self._lock:
            if not self._is_stopping:
                self._inbox.put(command)
                if isinstance(command, Submit):
                    self._requests.add(command.request)
            return not self._is_stopping

    def _loop(self) -> None:
        try:
            while not self._is_stopping:
                self._take_commands()
                if self._scheduler.has_work:
                    with self._runner.stepping():
                        self._step()
                self._last_beat = time.monotonic()
            self._finish()
        except Exception as error:  # noqa: BLE001 - the thread's boundary: everyone waiting must be told
            _log.exception("engine failed", error=repr(error))
            self._fail("the engine has failed; see the server's log")
            self._finish()

    def _step(self) -> None:
        batch = self._scheduler.schedule()
        if not batch.rows:
            self._wait_for_command(_HELD_SECONDS)
        output = run_bisecting(self._run, batch)
        self._scheduler.commit(output.batch, output.sampled)
        for request, error in output.failed.items():
            self._scheduler.fail(request, error)
        if output.failed and not output.batch.rows:
            self._check_model()  # not one request of the step could be run

    def _run(self, batch: Batch) -> list[Sampled]:
        sampled = self._runner.run(batch)
        self._last_beat = time.monotonic()  # a step that fails is run again in parts, of which each may take its time
        return sampled

    def _on_stuck(self) -> None:
        """The watchdog's call, on its thread."""
        message = f"the engine is stuck: a step has taken more than {self._max_step_seconds:g} seconds"
        _log.error("engine stuck", reason=message)
        self._fail(message)
        self._give_up()

    def _fail(self, message: str) -> None:
        self.failure = message
        self._farewell = (message, "engine_failed")

    def _give_up(self) -> None:
        """Leave nobody waiting for a thread that hangs. Should it come round, it finds that it is to end."""
        with self._lock:
            self._is_stopping = True
        for request in list(self._requests):
            request.give_up(*self._farewell)

    def _check_model(self) -> None:
        """Raise unless the model computes a prompt of nobody's."""
        run_probe(self._runner, self._scheduler.pool)

    def _take_commands(self) -> None:
        """Obey all that has arrived; with nothing to run, wait for something to."""
        if not self._scheduler.has_work and self._inbox.empty():
            self._runner.forget_adapters()
            self._scheduler.check_integrity()
            self._wait_for_command(min(_IDLE_BEAT_SECONDS, self._max_step_seconds / 2))
        while not self._inbox.empty():
            self._obey(self._inbox.get_nowait())

    def _wait_for_command(self, seconds: float) -> None:
        with suppress(queue.Empty):
            self._obey(self._inbox.get(timeout=seconds))

    def _obey(self, command: Command) -> None:
        match command:
            case Submit(request):
                self._scheduler.add(request)
            case Abort(request, index):
                self._scheduler.abort(request, index)
            case Stop():
                self._is_stopping = True

    def _finish(self) -> None:
        """Leave nobody waiting: neither what runs, nor what is still in the inbox."""
        self._watchdog.stop()
        with self._lock:
            self._is_stopping = True
        self._scheduler.fail_all(*self._farewell)
        while not self._inbox.empty():
            command = self._inbox.get_nowait()
            if isinstance(command, Submit):
                command.request.give_up(*self._farewell)
