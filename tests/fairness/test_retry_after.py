"""When it is worth asking again: once as much as is lacking has ended, as fast as it lately did."""

import asyncio
import threading
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaplora_adapters.cancellation import Cancellation
from swaplora_server.config import Settings
from swaplora_server.end_rate import MAX_RETRY_SECONDS, MIN_RETRY_SECONDS, EndRate
from swaplora_server.http.transport import body_memory
from swaplora_server.http.transport.body_memory import BodyMemory
from swaplora_server.service.adapters import ingest as ingest_module
from swaplora_server.service.adapters import tenant_jobs as jobs_module
from swaplora_server.service.adapters.derivations import MAX_JOBS, Derivations
from swaplora_server.service.adapters.ingest import MAX_FETCHES, Ingest
from swaplora_server.service.adapters.tenant_jobs import UNKNOWN_SECONDS, TenantJobs
from swaplora_server.service.errors import RequestError


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, for whoever asks how fast things end."""
    clock = [1000.0]
    for module in (body_memory, jobs_module, ingest_module):
        monkeypatch.setattr(module, "EndRate", lambda seconds=30.0: EndRate(lambda: clock[0], seconds))
    return clock


@given(st.floats(0.05, 10), st.integers(1, 100), st.integers(1, 200))
def test_at_a_steady_rate_so_many_have_ended_by_then(gap: float, count: int, num_ends: int) -> None:
    clock = [0.0]
    ends = EndRate(lambda: clock[0])
    for _ in range(num_ends):
        clock[0] += gap
        ends.note()
    seconds = ends.retry_seconds(count)
    each = max(gap, 1 / num_ends)  # a rate is of a second at least
    assert MIN_RETRY_SECONDS <= seconds <= max(MIN_RETRY_SECONDS, min(MAX_RETRY_SECONDS, count * each + 1))
    clock[0] += 1000
    assert ends.retry_seconds(count, unknown=7) == 7


def test_a_body_for_which_there_is_no_memory_is_told_when_as_much_will_have_been_given_back(now: list[float]) -> None:
    memory = BodyMemory(1000)
    for _ in range(10):
        now[0] += 1
        memory.take(50)
        memory.give_back(50)
    memory.take(900)
    assert refused(lambda: memory.take(300)) == 4  # 200 bytes, at 500 in nine seconds
    memory.give_back(0)
    assert refused(lambda: memory.take(300)) == 4


def refused(ask: Any) -> int | None:
    """The seconds that the refusal says, in its header and in its words."""
    with pytest.raises(RequestError, match="try again in ") as caught:
        ask()
    assert caught.value.code == "overloaded"
    assert caught.value.message.endswith(f"try again in {caught.value.retry_seconds} s")
    return caught.value.retry_seconds


class SlowRegistry:
    """Puts what it is given as soon as it may."""

    def __init__(self) -> None:
        self.may_go_on = threading.Semaphore(0)

    def put_source(self, *_given: Any, **_named: Any) -> str:
        self.may_go_on.acquire()
        return "put"


async def refused_when_full(ask: Any, registry: SlowRegistry, most: int, now: list[float]) -> tuple[Any, Any]:
    """What one more is told where so many are waited for: while nothing is known, and when one has ended in 20 s."""

    async def answer() -> int | None:
        with pytest.raises(RequestError) as caught:
            await ask()
        return refused(lambda: (_ for _ in ()).throw(caught.value))

    pending = [asyncio.ensure_future(ask()) for _ in range(most)]
    await asyncio.sleep(0)
    unknown = await answer()
    for _ in range(3):
        now[0] += 20
        registry.may_go_on.release()
        done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        pending = [one for one in pending if one not in done] + [asyncio.ensure_future(ask()) for _ in done]
        await asyncio.sleep(0)
    known = await answer()
    for _ in pending:
        registry.may_go_on.release()
    await asyncio.gather(*pending)
    return unknown, known


def test_who_would_fetch_too_much_is_told_when_one_of_the_others_will_have_ended(now: list[float]) -> None:
    registry: Any = SlowRegistry()
    ingest = Ingest(registry, None, None, lambda _name, _error: None)
    try:
        told = asyncio.run(refused_when_full(lambda: ingest.fetch("a", "hf://b"), registry, MAX_FETCHES, now))
    finally:
        ingest.stop()
    assert told == (UNKNOWN_SECONDS, 14)  # three in forty seconds


def test_who_would_derive_too_much_is_told_when_one_of_the_others_will_have_ended(now: list[float]) -> None:
    registry = SlowRegistry()
    derivations = Derivations(Settings(), {})

    def job(_cancellation: Cancellation) -> str:
        return registry.put_source()

    try:
        told = asyncio.run(refused_when_full(lambda: derivations.makes.do("", job), registry, MAX_JOBS, now))
    finally:
        derivations.stop()
    assert told == (UNKNOWN_SECONDS, 14)


def test_a_tenant_that_has_as_many_jobs_as_it_may_keeps_no_other_from_its_own() -> None:
    jobs = TenantJobs("test-jobs", most=2)
    has_begun, may_go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def job(name: str, _cancellation: Cancellation) -> None:
        has_begun.set()
        assert may_go_on.wait(60)
        done.append(name)

    async def ask() -> None:
        first = asyncio.ensure_future(jobs.do("acme", partial(job, "acme 1")))
        await asyncio.to_thread(has_begun.wait, 60)
        waiting = [
            asyncio.ensure_future(jobs.do(tenant, partial(job, name)))
            for tenant, name in (("acme", "acme 2"), ("zeta", "zeta 1"), ("zeta", "zeta 2"))
        ]
        await asyncio.sleep(0)
        for tenant in ("acme", "zeta"):
            with pytest.raises(RequestError, match="2 others of this kind"):
                await jobs.do(tenant, partial(job, "too many"))
        may_go_on.set()
        await asyncio.gather(first, *waiting)

    try:
        asyncio.run(ask())
    finally:
        jobs.stop()
    assert done == ["acme 1", "acme 2", "zeta 1", "zeta 2"]
