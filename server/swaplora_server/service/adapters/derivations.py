"""Where adapters are made of others and measured against the base, beside what serves, for as long as somebody waits.

Each kind of work has its own queue: what is measured holds up nothing that is made.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.derive.base_files import BaseFiles
from swaplora_adapters.derive.deriver import Deriver
from swaplora_adapters.derive.process import DerivationProcess
from swaplora_adapters.fit.base import LinearShape
from swaplora_adapters.sources.workers import Workers
from swaplora_server.base.loading import source_of
from swaplora_server.config import Settings
from swaplora_server.end_rate import EndRate
from swaplora_server.service.errors import RequestError
from swaplora_server.service.wakeups import ended, result_of

MAX_JOBS = 8  # of a kind, waiting and running
RATE_SECONDS = 600.0  # in which some of them end
UNKNOWN_SECONDS = 10  # until it is worth asking again, where none has ended lately
_JOIN_SECONDS = 3.0
T = TypeVar("T")
Counts = dict[str, int | None]  # by module
Count = Callable[[str], Counts]


class _Shared(NamedTuple):
    future: Future[Counts]
    cancellation: Cancellation


class Derivations:
    """Belongs to the event loop. `stop`, which any thread may call, ends all of it."""

    def __init__(self, settings: Settings, shapes: Mapping[str, LinearShape]) -> None:
        """`shapes` are the base's linears that adapters may target."""
        self._making, self._counting = DerivationProcess(), DerivationProcess()
        self.shapes = shapes
        self.deriver = Deriver(self._making, shapes, settings.base_id, settings.max_adapter_bytes)
        self._settings = settings
        self._makers, self._counters = Workers(1, "derive-make"), Workers(1, "derive-count")
        self._ends = {workers: EndRate(seconds=RATE_SECONDS) for workers in (self._makers, self._counters)}
        self._shared: dict[str, _Shared] = {}

    @property
    def base_source(self) -> str:
        """The folder or hub id that the base was loaded from."""
        return str(source_of(self._settings, lambda _step: None))

    @cached_property
    def base_files(self) -> BaseFiles:
        """The base's own weights."""
        return BaseFiles(self.base_source)

    @property
    def num_counts(self) -> int:
        """Counts of intruders that wait or run."""
        return self._counters.num_jobs

    async def make(self, job: Callable[[Cancellation], T]) -> T:
        """What `job` returns, once its turn has come. Whoever is cancelled waits until no more of it runs.

        Raises RequestError when more would wait than is good.
        """
        cancellation = Cancellation()
        future = self._submit(self._makers, partial(job, cancellation), cancellation)
        try:
            return await result_of(future)
        finally:
            cancellation.leave()
            await ended(future)

    async def count_intruders(self, digest: str, in_a_folder: Callable[[Count], Counts]) -> Counts:
        """By module: `in_a_folder` calls what it is given with a folder that holds the adapter, and returns the same.

        All who ask about one digest share one run. Raises RequestError when more would wait than is good.
        """
        shared = self._shared.get(digest)
        if shared is None or shared.future.done() or not shared.cancellation.join():
            cancellation = Cancellation()
            count = partial(in_a_folder, partial(self._count, cancellation))
            shared = self._shared[digest] = _Shared(self._submit(self._counters, count, cancellation), cancellation)
        try:
            return await result_of(shared.future)
        finally:
            shared.cancellation.leave()
            if shared.cancellation.is_cancelled and self._shared.get(digest) is shared:
                del self._shared[digest]

    def stop(self) -> None:
        """Fail all who wait, end the processes, and wait a moment for what their jobs still do."""
        all_workers = (self._makers, self._counters)
        for workers in all_workers:
            workers.stop()
        for process in (self._making, self._counting):
            process.stop()
        until = time.monotonic() + _JOIN_SECONDS
        for workers in all_workers:
            workers.join(until)

    def _count(self, cancellation: Cancellation, folder: str) -> Counts:
        arguments = {"folder": folder, "base": self.base_source, "shapes": self.shapes}
        counts: Counts = self._counting.run("count_intruders", arguments, cancellation)
        return counts

    def _submit(self, workers: Workers, job: Callable[[], T], cancellation: Cancellation) -> Future[T]:
        ends = self._ends[workers]
        if workers.num_jobs >= MAX_JOBS:
            seconds = ends.retry_seconds(1, UNKNOWN_SECONDS)
            message = f"{MAX_JOBS} others of this kind are waited for; try again in {seconds} s"
            raise RequestError("overloaded", message, retry_seconds=seconds)
        future = workers.submit(job, cancellation=cancellation)
        future.add_done_callback(lambda _future: ends.note())
        return future
