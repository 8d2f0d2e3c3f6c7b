"""The engine thread: continuous batching. It takes commands, and while there is work runs: schedule, run, commit."""

import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import structlog

from swaplora_server.engine.probe import run_probe
from swaplora_server.engine.request import FinishReason, Request, TokenEvent
from swaplora_server.engine.row_faults import run_bisecting
from swaplora_server.engine.runner import StepRunner
from swaplora_server.engine.scheduler import Scheduler
from swaplora_server.engine.snapshot import Snapshot

_IDLE_BEAT_SECONDS = 1.0
_HELD_SECONDS = 0.001  # between two looks at whether a sequence can be run, where none can
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
    request makes fail ends that request; the engine itself ends only of what fails without any.
    """

    def __init__(self, scheduler: Scheduler, runner: StepRunner) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._is_stopping = False
        self._lock = threading.Lock()  # between a command and the thread's last look at its inbox
        self.failure: str | None = None
        self._last_beat = time.monotonic()

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
            seconds_since_beat=time.monotonic() - self._last_beat,
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End what still runs with an error, and the thread with it."""
        self._send(Stop())
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: Request) -> None:
        """Hand a request over. On a stopped engine it ends at once with an error event."""
        if not self._send(Submit(request)):
            _refuse(request, self.failure or "the engine has stopped")

    def abort(self, request: Request, index: int | None = None) -> None:
        """End the request, or one sequence of it, before the next step. Harmless when it has ended already."""
        self._send(Abort(request, index))

    def _send(self, command: Command) -> bool:
        """Whether the thread will still obey `command`."""
        with self._lock:
            if not self._is_stopping:
                self._inbox.put(command)
            return not self._is_stopping

    def _loop(self) -> None:
        try:
            while not self._is_stopping:
                self._take_commands()
                if self._scheduler.has_work:
                    with self._runner.stepping():
                        self._step()
                self._last_beat = time.monotonic()
            self._finish("the server is shutting down")
        except Exception as error:  # noqa: BLE001 - the thread's boundary: everyone waiting must be told
            _log.exception("engine failed", error=repr(error))
            self.failure = "the engine has failed; see the server's log"
            self._finish(self.failure)

    def _step(self) -> None:
        batch = self._scheduler.schedule()
        if not batch.rows:
            self._wait_for_command(_HELD_SECONDS)
        output = run_bisecting(self._runner.run, batch)
        self._scheduler.commit(output.batch, output.sampled)
        for request, error in output.failed.items():
            self._scheduler.fail(request, error)
        if output.failed and not output.batch.rows:
            self._check_model()  # not one request of the step could be run

    def _check_model(self) -> None:
        """Raise unless the model computes a prompt of nobody's."""
        run_probe(self._runner, self._scheduler.pool)

    def _take_commands(self) -> None:
        """Obey all that has arrived; with nothing to run, wait for something to."""
        if not self._scheduler.has_work and self._inbox.empty():
            self._runner.forget_adapters()
            self._scheduler.check_integrity()
            self._wait_for_command(_IDLE_BEAT_SECONDS)
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

    def _finish(self, message: str) -> None:
        """Leave nobody waiting: neither what runs, nor what is still in the inbox."""
        with self._lock:
            self._is_stopping = True
        self._scheduler.fail_all(message)
        while not self._inbox.empty():
            command = self._inbox.get_nowait()
            if isinstance(command, Submit):
                _refuse(command.request, message)


def _refuse(request: Request, message: str) -> None:
    for index in range(request.num_sequences):
        request.finish(TokenEvent(index, finish_reason=FinishReason.ERROR, error=message))
