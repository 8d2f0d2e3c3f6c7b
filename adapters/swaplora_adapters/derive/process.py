"""Long computations in a process of their own: at low priority, on one thread, bounded in memory and processor time."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from swaplora_adapters.errors import (
    AdapterError,
    AdapterTooLargeError,
    DerivationFailedError,
    InvalidAdapterError,
    StorageFailedError,
    StorageFullError,
    UnsupportedAdapterError,
)

MEMORY_BYTES = 4 << 30  # beyond what Python and torch take by themselves
CPU_SECONDS = 1800
NICENESS = 10
_TOLD = (InvalidAdapterError, UnsupportedAdapterError, AdapterTooLargeError, StorageFullError, StorageFailedError)
_ERRORS: Mapping[str, type[AdapterError]] = {kind.code: kind for kind in _TOLD}


class DerivationProcess:
    """Runs the jobs of `derive.worker`, one at a time whoever asks. Thread-safe."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def run(self, job: str, arguments: Mapping[str, Any]) -> Any:
        """What the job answers, as JSON has it.

        Raises the job's AdapterError, and DerivationFailedError when it passes its bounds or `stop` ends it.
        """
        request = json.dumps({"job": job, "arguments": arguments}).encode()
        with self._turn:
            process = self._start()
            try:
                answer, _ = process.communicate(request)
            finally:
                process.kill()
                self._running = None
        return read_answer(process.returncode, answer)

    @property
    def is_running(self) -> bool:
        return self._running is not None

    def stop(self) -> None:
        """End the job that runs, and begin no other."""
        with self._lock:
            self._is_stopped = True
            if self._running is not None:
                self._running.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        """Its own modules are those that this process has found; nothing of the current folder is imported."""
        command = [sys.executable, "-P", "-m", "swaplora_adapters.derive.worker"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        with self._lock:
            if self._is_stopped:
                raise DerivationFailedError("the server is stopping")
            self._running = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
            )
            return self._running


def bound_this_process(memory_bytes: int = MEMORY_BYTES, cpu_seconds: int = CPU_SECONDS) -> None:
    """Bound what this process may take from now on; for the worker, once it has imported what it needs.

    Past its processor time it is killed by SIGXCPU; an allocation past its memory fails.
    """
    os.nice(NICENESS)
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
    if status != 0:
        raise DerivationFailedError(
            f"it ended early, as a rule for want of memory, of which it may take {MEMORY_BYTES >> 20} MiB; "
            "the server's log says more"
        )
    content = json.loads(answer)
    if "result" in content:
        return content["result"]
    kind, reasons = _ERRORS[content["code"]], content["reasons"]
    raise kind(reasons) if issubclass(kind, InvalidAdapterError) else kind(reasons[0])
