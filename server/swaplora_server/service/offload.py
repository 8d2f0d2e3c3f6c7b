"""Work of requests that is too long for the event loop: few threads of its own, a bounded queue."""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

from swaplora_server.end_rate import EndRate
from swaplora_server.service.errors import RequestError

GIL_PAUSE = 3
PATIENCE = 16  # a job lets later ones before it that are together this many times as large, and no more
T = TypeVar("T")


class WorkQueue(Generic[T]):
    """Items in the order of their coming, but for small ones, which overtake large ones.

    An item is overtaken by less than `PATIENCE` times its own size in all, so nothing waits for ever.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._numbers = itertools.count()
        self._size_of_all = 0  # that ever came

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, size: int, item: T) -> None:
        self._size_of_all += size
        heapq.heappush(self._heap, (size + self._size_of_all / PATIENCE, next(self._numbers), item))

    def pop(self) -> T:
        """The next one. Raises IndexError if there is none."""
        return heapq.heappop(self._heap)[-1]

    def discard(self, item: T) -> None:
        """Take `item` out, if it is still in."""
        self._heap = [entry for entry in self._heap if entry[-1] is not item]
        heapq.heapify(self._heap)


class Offload:
    """Does what requests bring, `num_threads` jobs at once and at most `max_waiting` more in a queue.

    Belongs to the event loop. A job whose client has gone is not begun. The threads are daemons: one that is busy with
    what nobody waits for holds up no exit.
    """

    def __init__(
        self,
        num_threads: int,
        max_waiting: int,
        name: str,
        begin: Callable[[], None] = lambda: None,
        stack_bytes: int = 0,
    ) -> None:
        """Each thread calls `begin` before its job, and has a stack of `stack_bytes`: 0 for the system's own."""
        self._num_threads = num_threads
        self._max_waiting = max_waiting
        self._name = name
        self._prepare = begin
        self._stack_bytes = stack_bytes
        self._waiting: WorkQueue[Callable[[], None]] = WorkQueue()
        self._running: set[threading.Thread] = set()
        self._ends = EndRate()  # of jobs

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def do(self, size: int, job: Callable[[], T]) -> T:
        """What `job` returns or raises; `size` is how much work it is, beside others.

        Raises RequestError when more would wait than is good. Whoever is cancelled takes a job that waits with it.
        """
        if self.num_running >= self._num_threads and self.num_waiting >= self._max_waiting:
            seconds = self._ends.retry_seconds(self.num_waiting)
            message = f"too many requests wait for work as long as this; try again in {seconds} s"
            raise RequestError("overloaded", message, retry_seconds=seconds)
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        begin = partial(self._begin, job, result)
        self._waiting.push(size, begin)
        self._begin_waiting()
        try:
            return await result
        finally:
            self._waiting.discard(begin)

    def join(self, seconds: float) -> None:
        """Wait for what runs, `seconds` at most in all. Callable from any thread."""
        until = time.monotonic() + seconds
        for thread in list(self._running):
            thread.join(max(0.0, until - time.monotonic()))

    def _begin_waiting(self) -> None:
        while self._waiting and self.num_running < self._num_threads:
            self._waiting.pop()()

    def _begin(self, job: Callable[[], T], result: "asyncio.Future[T]") -> None:
        loop = result.get_loop()

        def run() -> None:
            try:
                self._prepare()
                end = partial(_answer, result, job())
            except Exception as error:  # noqa: BLE001 - the thread's boundary: it is raised where the job is awaited
                end = partial(_fail, result, error)
            except BaseException as error:  # noqa: BLE001 - as a panic in a library: an asker must never hang
                end = partial(_fail, result, RuntimeError(f"the job ended by {error!r}"))
            with suppress(RuntimeError):  # the loop has closed: nobody is left to tell
                loop.call_soon_threadsafe(self._end, thread, end)

        thread = threading.Thread(target=run, name=self._name, daemon=True)
        usual_bytes = threading.stack_size(self._stack_bytes)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread left
            _fail(result, error)
        else:
            self._running.add(thread)
        finally:
            threading.stack_size(usual_bytes)

    def _end(self, thread: threading.Thread, end: Callable[[], None]) -> None:
        self._running.discard(thread)
        self._ends.note()
        end()
        self._begin_waiting()


class GilTurns:
    """For what holds the interpreter's lock, the GIL, for long: one at a time, and three times as long between two.

    So whatever needs the interpreter now and then has it for most of the time, however many want a turn: a step, which
    needs it between its parts, is held up by one or two of them.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._lock = threading.Lock()
        self._clock, self._sleep = clock, sleep
        self._free_at = 0.0

    def do(self, job: Callable[[], T]) -> T:
        """What `job` returns or raises. For threads that may wait; one that has a turn takes no other."""
        with self._lock:
            self._sleep(max(0.0, self._free_at - self._clock()))
            began = self._clock()
            try:
                return job()
            finally:
                now = self._clock()
                self._free_at = now + GIL_PAUSE * (now - began)


async def in_own_thread(job: Callable[[], T]) -> T:
    """What `job` returns or raises; no other work can be in its way."""
    return await Offload(1, 0, "alone").do(0, job)


def _answer(result: "asyncio.Future[T]", value: T) -> None:
    if not result.done():
        result.set_result(value)


def _fail(result: "asyncio.Future[T]", error: Exception) -> None:
    if not result.done():
        result.set_exception(error)
