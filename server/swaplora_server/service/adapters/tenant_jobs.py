"""Long work on adapters that requests wait for: done by few threads, for tenants in turn."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.sources.workers import Workers
from swaplora_server.end_rate import EndRate
from swaplora_server.service.errors import RequestError
from swaplora_server.service.wakeups import ended, result_of

RATE_SECONDS = 600.0  # in which some of them end: as long as a fetch may take
UNKNOWN_SECONDS = 5  # until it is worth asking again, where none has ended lately
T = TypeVar("T")


class TenantJobs:
    """Jobs of one kind. However many one tenant has, another's next one is begun after one of each tenant.

    Of several threads one is left to the others, however long those of one tenant take. Belongs to the event loop.
    `stop` and `join`, which any thread may call, are those of `Workers`.
    """

    def __init__(self, name: str, *, num_threads: int = 1, most: int) -> None:
        """`most` of one tenant, waiting and running; `name` is the threads'."""
        self.most = most
        self._workers = Workers(num_threads, name, most_of_one=max(1, num_threads - 1))
        self._ends = EndRate(seconds=RATE_SECONDS)
        self.stop, self.join = self._workers.stop, self._workers.join

    @property
    def num_jobs(self) -> int:
        """Of all tenants, waiting and running."""
        return self._workers.num_jobs

    async def do(self, tenant: str, job: Callable[[Cancellation], T]) -> T:
        """What `job` returns, once its turn has come. Whoever is cancelled waits until no more of it runs.

        Raises RequestError for one more than the tenant may have.
        """
        cancellation = Cancellation()
        future = self.submit(tenant, partial(job, cancellation), cancellation)
        try:
            return await result_of(future)
        finally:
            cancellation.leave()
            await ended(future)

    def submit(self, tenant: str, job: Callable[[], T], cancellation: Cancellation) -> Future[T]:
        """See `Workers.submit`. Raises RequestError for one more than the tenant may have."""
        if self._workers.num_jobs_of(tenant) >= self.most:
            seconds = self._ends.retry_seconds(1, UNKNOWN_SECONDS)
            message = f"{self.most} others of this kind are waited for; try again in {seconds} s"
            raise RequestError("overloaded", message, retry_seconds=seconds)
        future = self._workers.submit(job, cancellation=cancellation, owner=tenant)
        future.add_done_callback(lambda _future: self._ends.note())
        return future
