"""Threads for what may be long in coming: few, and not waited for when the server stops."""

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, TypeVar

from swaplora_adapters.cancellation import Cancellation, WorkCancelledError
from swaplora_adapters.errors import StoppingError
from swaplora_adapters.priority import lower_priority

T = TypeVar("T")


class _Job(NamedTuple):
    do: Callable[[], Any]
    future: Future[Any]


class Workers:
    """Does jobs, `num_threads` at once. Owners take turns; an owner's own are done in the order they come. Thread-safe.

    They run at low priority, since no step of the model waits for them. They are daemons, which those of an executor
    are not: one that hears nothing from a host holds up no exit.
    """

    def __init__(self, num_threads: int, name: str, *, most_of_one: int | None = None) -> None:
        """Of one owner's no more than `most_of_one` run at once, if that is said."""
        self._num_threads = num_threads
        self._most_of_one = num_threads if most_of_one is None else most_of_one
        self._name = name
        self._threads: list[threading.Thread] = []
        self._waiting: OrderedDict[Hashable, deque[_Job]] = OrderedDict()  # by owner; whose turn it is comes first
        self._changed = threading.Condition()
        self._open: dict[Future[Any], Hashable] = {}  # with its owner
        self._running: Counter[Hashable] = Counter()  # by owner
        self._is_stopped = False

    @property
    def num_jobs(self) -> int:
        """Waiting and running."""
        return len(self._open)

    def num_jobs_of(self, owner: Hashable) -> int:
        """An owner's, waiting and running."""
        with self._changed:
            return sum(other == owner for other in self._open.values())

    def num_waiting_of(self, owner: Hashable) -> int:
        with self._changed:
            return len(self._waiting.get(owner, ()))

    def submit(
        self, job: Callable[[], T], *, cancellation: Cancellation | None = None, owner: Hashable = None
    ) -> Future[T]:
        """What `job` returns or raises; StoppingError if `stop` comes first, WorkCancelledError if a cancellation.

        A job that is cancelled is not begun; one that runs has to look itself. Any number may wait for the future: none
        of them can cancel it.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            if self._is_stopped:
                future.set_exception(StoppingError())
                return future
            try:
                self._begin_thread()
            except RuntimeError as error:  # the system has no thread left: those that there are will do
                if not self._threads:
                    future.set_exception(error)
                    return future
            self._open[future] = owner
            self._waiting.setdefault(owner, deque()).append(_Job(job, future))
            self._changed.notify()
        if cancellation is not None:
            cancellation.when_cancelled(partial(self._drop, owner, future))
        return future

    def stop(self) -> None:
        """Fail what waits and what runs, at once; what runs ends unheard."""
        with self._changed:
            self._is_stopped = True
            failed, self._open = self._open, {}
            self._waiting.clear()
            self._changed.notify_all()
        for future in failed:
            future.set_exception(StoppingError())

    def join(self, until: float) -> None:
        """After `stop`: wait for what runs, to the moment `until` of the monotonic clock at most."""
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _begin_thread(self) -> None:
        """One more, while there may be more. Needs the lock."""
        if len(self._threads) < self._num_threads:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        lower_priority()
        while (taken := self._next()) is not None:
            owner, job = taken
            self._do(job)
            with self._changed:
                self._running[owner] -= 1
                self._running += Counter()  # forgets who has none
                self._changed.notify_all()

    def _next(self) -> tuple[Hashable, _Job] | None:
        """The first one of the owner whose turn it is; None when it is over."""
        with self._changed:
            while not self._is_stopped:
                if (taken := self._take()) is not None:
                    return taken
                self._changed.wait()
            return None

    def _take(self) -> tuple[Hashable, _Job] | None:
        """None where all who wait have as many running as they may. Needs the lock."""
        for owner, jobs in self._waiting.items():
            if self._running[owner] < self._most_of_one:
                job = jobs.popleft()
                del self._waiting[owner]
                if jobs:
                    self._waiting[owner] = jobs
                self._running[owner] += 1
                return owner, job
        return None

    def _do(self, job: _Job) -> None:
        try:
            result = job.do()
        except Exception as error:  # noqa: BLE001 - the worker's boundary: a waiter must never hang
            if self._is_awaited(job.future):
                job.future.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - as a panic in a library: the thread goes on
            if self._is_awaited(job.future):
                job.future.set_exception(RuntimeError(f"the job ended by {error!r}"))
        else:
            if self._is_awaited(job.future):
                job.future.set_result(result)

    def _drop(self, owner: Hashable, future: Future[Any]) -> None:
        """Take a job out that waits; what runs or is done is left alone."""
        with self._changed:
            jobs = self._waiting.get(owner, deque())
            job = next((job for job in jobs if job.future is future), None)
            if job is None:
                return
            jobs.remove(job)
            if not jobs:
                del self._waiting[owner]
            self._open.pop(future, None)
        future.set_exception(WorkCancelledError())

    def _is_awaited(self, future: Future[Any]) -> bool:
        """Whether `stop` has not answered it yet; only one of the two does."""
        with self._changed:
            is_awaited = future in self._open
            self._open.pop(future, None)
            return is_awaited
