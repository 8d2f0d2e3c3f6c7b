"""Threads for what may be long in coming: few, and not waited for when the server stops."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from swaplora_adapters.errors import SourceFailedError
from swaplora_adapters.registry.sources.transfer import STOPPING

T = TypeVar("T")


class Workers:
    """Does jobs in the order they come, `num_threads` at once. Thread-safe.

    The threads are daemons, which those of an executor are not: one that hears nothing from a host holds up no exit.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        self._is_stopped = False

    @property
    def num_jobs(self) -> int:
        """Waiting and running."""
        return len(self._open)

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """What `job` returns or raises, or SourceFailedError if `stop` comes first.

        Any number may wait for the future: none of them can cancel it.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._is_stopped:
                future.set_exception(SourceFailedError(STOPPING))
                return future
            self._open.add(future)
            self._jobs.put(partial(self._do, job, future))
            if len(self._threads) < self._num_threads:
                self._threads.append(threading.Thread(target=self._work, name=self._name, daemon=True))
                self._threads[-1].start()
        return future

    def stop(self) -> None:
        """Fail what waits and what runs, at once; what runs ends unheard."""
        with self._lock:
            self._is_stopped = True
            failed, self._open = self._open, set()
            for _ in self._threads:
                self._jobs.put(None)
        for future in failed:
            future.set_exception(SourceFailedError(STOPPING))

    def join(self, until: float) -> None:
        """After `stop`: wait for what runs, to the moment `until` of the monotonic clock at most."""
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _do(self, job: Callable[[], T], future: Future[T]) -> None:
        if future not in self._open:
            return
        try:
            result = job()
        except Exception as error:  # noqa: BLE001 - the worker's boundary: a waiter must never hang
            if self._is_awaited(future):
                future.set_exception(error)
        else:
            if self._is_awaited(future):
                future.set_result(result)

    def _is_awaited(self, future: Future[Any]) -> bool:
        """Whether `stop` has not answered it yet; only one of the two does."""
        with self._lock:
            is_awaited = future in self._open
            self._open.discard(future)
            return is_awaited
