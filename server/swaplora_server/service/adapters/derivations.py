"""Where adapters are made of others and measured against the base, beside what serves, for as long as somebody waits.

Each kind of work has its own queue, of which tenants take turns: what is measured holds up nothing that is made.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cached_property, partial
from typing import NamedTuple

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.derive.base_files import BaseFiles
from swaplora_adapters.derive.deriver import Deriver
from swaplora_adapters.derive.process import DerivationProcess
from swaplora_adapters.fit.base import LinearShape
from swaplora_server.base.loading import source_of
from swaplora_server.config import Settings
from swaplora_server.service.adapters.tenant_jobs import TenantJobs
from swaplora_server.service.wakeups import result_of

MAX_JOBS, MAX_INSPECTIONS = 8, 16  # of a kind and a tenant, waiting and running
_JOIN_SECONDS = 3.0
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
        self.makes = TenantJobs("derive-make", most=MAX_JOBS)
        self.counts = TenantJobs("derive-count", most=MAX_JOBS)  # of intruders
        self.inspections = TenantJobs("inspect", most=MAX_INSPECTIONS)
        self._shared: dict[tuple[str, str], _Shared] = {}  # by tenant and digest

    @property
    def base_source(self) -> str:
        """The folder or hub id that the base was loaded from."""
        return str(source_of(self._settings, lambda _step: None))

    @cached_property
    def base_files(self) -> BaseFiles:
        """The base's own weights."""
        return BaseFiles(self.base_source)

    async def count_intruders(self, tenant: str, digest: str, in_a_folder: Callable[[Count], Counts]) -> Counts:
        """By module: `in_a_folder` calls what it is given with a folder that holds the adapter, and returns the same.

        All of a tenant who ask about one digest share one run. Raises RequestError for one more than it may have.
        """
        key = tenant, digest
        shared = self._shared.get(key)
        if shared is None or shared.future.done() or not shared.cancellation.join():
            cancellation = Cancellation()
            count = partial(in_a_folder, partial(self._count, cancellation))
            shared = self._shared[key] = _Shared(self.counts.submit(tenant, count, cancellation), cancellation)
        try:
            return await result_of(shared.future)
        finally:
            shared.cancellation.leave()
            if shared.cancellation.is_cancelled and self._shared.get(key) is shared:
                del self._shared[key]

    def stop(self) -> None:
        """Fail all who wait, end the processes, and wait a moment for what their jobs still do."""
        queues = (self.makes, self.counts, self.inspections)
        for queue in queues:
            queue.stop()
        for process in (self._making, self._counting):
            process.stop()
        until = time.monotonic() + _JOIN_SECONDS
        for queue in queues:
            queue.join(until)

    def _count(self, cancellation: Cancellation, folder: str) -> Counts:
        arguments = {"folder": folder, "base": self.base_source, "shapes": self.shapes}
        counts: Counts = self._counting.run("count_intruders", arguments, cancellation)
        return counts
