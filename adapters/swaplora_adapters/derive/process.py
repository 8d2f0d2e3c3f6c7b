"""Long computations in a process of their own: at low priority, on one thread, bounded in memory and processor time."""

import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from subprocess import DEVNULL, PIPE, Popen
from typing import IO, Any

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.errors import (
    AdapterError,
    AdapterTooLargeError,
    DerivationFailedError,
    InvalidAdapterError,
    StoppingError,
    StorageFailedError,
    StorageFullError,
    UnsupportedAdapterError,
)
from swaplora_adapters.priority import come_after

MEMORY_BYTES = 4 << 30  # beyond what Python and torch take by themselves
CPU_SECONDS = 1800
_TOLD = (InvalidAdapterError, UnsupportedAdapterError, AdapterTooLargeError, StorageFullError, StorageFailedError)
_ERRORS: Mapping[str, type[AdapterError]] = {kind.code: kind for kind in _TOLD}


class DerivationProcess:
    """Runs the jobs of `derive.worker`, one at a time whoever asks. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_taken = False
        self._running: Popen[bytes] | None = None
        self._is_stopped = False

    def run(self, job: str, arguments: Mapping[str, Any], cancellation: Cancellation | None = None) -> Any:
        """What the job answers, as JSON has it.

        Raises the job's AdapterError, DerivationFailedError when it passes its bounds, StoppingError after `stop`, and
        WorkCancelledError when `cancellation` comes, which ends it too.
        """
        request = json.dumps({"job": job, "arguments": arguments}).encode() + b"\n"
        cancellation = cancellation or Cancellation()
        with self._turn(cancellation), self._started() as (process, answers):
            cancellation.when_cancelled(process.kill)
            answer = _exchange(process, request, answers)
            status = process.wait()
        cancellation.check()
        if self._is_stopped:
            raise StoppingError
        return read_answer(status, answer)

    @property
    def is_running(self) -> bool:
        return self._running is not None

    def stop(self) -> None:
        """End the job that runs, and begin no other."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            if self._running is not None:
                self._running.kill()

    @contextmanager
    def _turn(self, cancellation: Cancellation) -> Iterator[None]:
        """Wait until no other job runs, or nobody waits for this one any more."""
        cancellation.when_cancelled(self._look_again)
        with self._changed:
            self._changed.wait_for(lambda: cancellation.is_cancelled or self._is_stopped or not self._is_taken)
            cancellation.check()
            if self._is_stopped:
                raise StoppingError()
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()

    def _look_again(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @contextmanager
    def _started(self) -> Iterator[tuple["Popen[bytes]", IO[bytes]]]:
        """The process, and where its answer comes from: what a library prints there is no part of that.

        Its own modules are those that this process has found; nothing of the current folder is imported.
        """
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        read_end, write_end = os.pipe()
        with open(read_end, "rb") as answers:
            command = [sys.executable, "-P", "-m", "swaplora_adapters.derive.worker", str(write_end)]
            try:
                process = self._start(command, environment, write_end)
            finally:
                os.close(write_end)
            try:
                yield process, answers
            finally:
                process.kill()
                process.communicate()  # closes the pipe, and waits for its end
                self._running = None

    def _start(self, command: Sequence[str], environment: Mapping[str, str], write_end: int) -> "Popen[bytes]":
        with self._changed:
            if self._is_stopped:
                raise StoppingError()
            try:
                self._running = Popen(
                    command,
                    stdin=PIPE,
                    stdout=DEVNULL,
                    env=environment,
                    pass_fds=[write_end],
                    start_new_session=True,
                )
            except OSError as error:
                raise DerivationFailedError(f"no process could be started for it: {error.strerror}") from error
            return self._running


def _exchange(process: "Popen[bytes]", request: bytes, answers: IO[bytes]) -> bytes:
    """The answer to `request`. The way to the worker stays open: that it closes tells it that this process is gone."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended: its status says how
        process.stdin.write(request)
        process.stdin.flush()
    return answers.read()


def bound_this_process(memory_bytes: int = MEMORY_BYTES, cpu_seconds: int = CPU_SECONDS) -> None:
    """Bound what this process may take from now on; for the worker, once it has imported what it needs.

    Past its processor time it is killed by SIGXCPU; an allocation past its memory fails.
    """
    come_after(os.getppid())  # the server, and not the thread that started this, which may come after it already
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    limit = _data_bytes() + memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def answer_of(error: AdapterError) -> dict[str, Any]:
    """An error of `_TOLD` as `read_answer` reads it."""
    reasons: Sequence[str] = error.reasons if isinstance(error, InvalidAdapterError) else [str(error)]
    return {"code": error.code, "reasons": list(reasons)}


def _data_bytes() -> int:
    """Of private writable memory that this process has mapped, which RLIMIT_DATA counts (proc(5), in pages)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def read_answer(status: int, answer: bytes) -> Any:
    """The result of a worker that ended with this status; raises what `DerivationProcess.run` does."""
    if status == -signal.SIGXCPU:
        raise DerivationFailedError(f"it was not done after {CPU_SECONDS} seconds of processor time")
    if status != 0 or not answer:
        raise DerivationFailedError(
            f"it ended early, as a rule for want of memory, of which it may take {MEMORY_BYTES >> 20} MiB; "
            "the server's log says more"
        )
    content = json.loads(answer)
    if "result" in content:
        return content["result"]
    kind, reasons = _ERRORS[content["code"]], content["reasons"]
    raise kind(reasons) if issubclass(kind, InvalidAdapterError) else kind(reasons[0])
