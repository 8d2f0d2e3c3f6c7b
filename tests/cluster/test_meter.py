"""What replicas count together is counted once, and what a lost one had begun ends with it."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from metering import FAULT, Clock, Remote
from swaplora_server.access.caller import Caller
from swaplora_server.access.limits import WINDOW_SECONDS, LimitReachedError, Limits
from swaplora_server.cluster.meter import INTERFACE, SILENT_SECONDS, CommonMeter, SharedMeter
from swaplora_server.http.auth import COUNTED_AS
from swaplora_server.http.dependencies import _service


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def remote(clock: Clock) -> Remote:
    return Remote(CommonMeter(clock))


@pytest.fixture
def two(remote: Remote, clock: Clock) -> list[SharedMeter]:
    return [SharedMeter(name, lambda: remote, clock) for name in ("a", "b")]


async def test_a_limit_is_that_of_all_replicas(two: list[SharedMeter], clock: Clock) -> None:
    limited = {"tenant": Limits(requests_per_minute=3)}
    for number in range(3):
        await two[number % 2].begin(limited, is_change=False)
    for meter in two:
        with pytest.raises(LimitReachedError, match="tenant has 3 requests a minute") as reached:
            await meter.begin(limited, is_change=False)
        assert reached.value.retry_seconds == 60
    clock.now += 60
    await two[1].begin(limited, is_change=False)


async def test_what_ends_is_counted_out_once(two: list[SharedMeter]) -> None:
    limited = {"key": Limits(concurrent_requests=2)}
    ends = [await meter.begin(limited, is_change=False) for meter in two]
    ends[0]()
    ends[0]()
    await two[1].begin(limited, is_change=False)
    with pytest.raises(LimitReachedError):
        await two[0].begin(limited, is_change=False)


async def test_what_many_replicas_are_asked_at_once_counts_once(two: list[SharedMeter], clock: Clock) -> None:
    """It is let in by all or by none, and runs until the last of them has ended it."""
    limited = {"key": Limits(concurrent_requests=1, requests_per_minute=2)}

    async def begin(counted_as: str) -> list[Callable[[], None]]:
        return [await meter.begin(limited, is_change=False, counted_as=counted_as) for meter in two]

    ends = await begin("first")
    ends[0]()
    with pytest.raises(LimitReachedError, match="1 requests at once"):
        await begin("second")
    ends[1]()
    with pytest.raises(LimitReachedError, match="1 requests at once"):  # and so says who is asked later
        await two[1].begin(limited, is_change=False, counted_as="second")
    for end in await begin("third"):
        end()
    with pytest.raises(LimitReachedError, match="2 requests a minute"):
        await begin("fourth")
    clock.now += WINDOW_SECONDS
    await begin("fourth")


async def test_what_is_asked_again_runs_as_any_other(two: list[SharedMeter]) -> None:
    """One replica has answered that it is not well, the next one is asked: nothing more of the minute's is taken."""
    limited = {"key": Limits(concurrent_requests=1, requests_per_minute=2)}
    (await two[0].begin(limited, is_change=False, counted_as="first"))()
    (await two[0].begin(limited, is_change=False, counted_as="second"))()
    end = await two[1].begin(limited, is_change=False, counted_as="first")
    with pytest.raises(LimitReachedError, match="1 requests at once"):
        await two[1].begin(limited, is_change=False, counted_as="second")
    end()
    with pytest.raises(LimitReachedError, match="2 requests a minute"):
        await two[1].begin(limited, is_change=False)


@pytest.mark.parametrize("is_ended", [False, True])
async def test_what_has_run_for_long_is_asked_again_as_the_same(
    two: list[SharedMeter], remote: Remote, clock: Clock, is_ended: bool
) -> None:
    """It is known as long as it runs, and for a while after that; then nothing is kept of it."""
    limited = {"key": Limits(concurrent_requests=1, requests_per_minute=1)}
    end = await two[0].begin(limited, is_change=False, counted_as="first")
    for _ in range(3):
        clock.now += SILENT_SECONDS / 2
        for meter in two:
            meter.tell_alive()
    if is_ended:
        end()
    clock.now += SILENT_SECONDS / 4
    again = await two[1].begin(limited, is_change=False, counted_as="first")
    end()
    again()
    clock.now += 2 * SILENT_SECONDS
    await two[1].begin(limited, is_change=False, counted_as="second")
    assert list(remote.meter._counted) == ["second"]  # noqa: SLF001


async def test_tokens_that_are_not_used_go_back(two: list[SharedMeter]) -> None:
    limited = {"key": Limits(tokens_per_minute=100)}
    (await two[0].reserve(limited, 90)).settle(10)
    await two[1].reserve(limited, 90)
    with pytest.raises(LimitReachedError) as reached:
        await two[0].reserve(limited, 101)
    assert reached.value.retry_seconds is None


async def test_tokens_of_what_is_asked_again_are_taken_once(two: list[SharedMeter], remote: Remote) -> None:
    """The first replica is lost with what it held; what it says of that after all changes nothing."""
    limited = {"key": Limits(tokens_per_minute=100)}
    first = [await two[0].reserve(limited, 30, "first") for _ in range(2)]  # of one request, side by side
    again = [await two[1].reserve(limited, 30, "first") for _ in range(2)]
    for reservation in first:
        reservation.settle(0)
    with pytest.raises(LimitReachedError):
        await two[0].reserve(limited, 41, "second")
    await two[0].reserve(limited, 40, "second")
    for reservation in again:
        reservation.settle(0)
    assert len(remote.meter._reserved) == 1  # noqa: SLF001
    await two[0].reserve(limited, 60)


async def test_what_a_lost_replica_had_begun_ends(two: list[SharedMeter], clock: Clock) -> None:
    """And not what one has begun that is only silent for a while, or long at work."""
    limited = {"key": Limits(concurrent_requests=2)}
    for meter in two:
        await meter.begin(limited, is_change=False)
    for _ in range(4):
        clock.now += SILENT_SECONDS / 2
        two[1].tell_alive()
    await two[1].begin(limited, is_change=False)
    with pytest.raises(LimitReachedError):
        await two[1].begin(limited, is_change=False)


async def test_who_has_no_limits_asks_nobody(two: list[SharedMeter], remote: Remote) -> None:
    (await two[0].begin({"key": Limits(), "tenant": Limits(tokens_per_minute=5)}, is_change=True))()
    (await two[0].reserve({"key": Limits(requests_per_minute=5)}, 10**6)).settle(3)
    two[0].tell_alive()
    assert remote.num_calls == 0


async def test_nobody_is_let_in_uncounted(two: list[SharedMeter], remote: Remote, clock: Clock) -> None:
    limited = {"key": Limits(requests_per_minute=3, tokens_per_minute=3)}
    remote.fault = "gone"
    with pytest.raises(LimitReachedError) as reached:
        await two[0].begin(limited, is_change=False)
    assert reached.value.retry_seconds == 1
    with pytest.raises(LimitReachedError):
        await two[0].reserve(limited, 1)
    assert remote.num_calls == 2  # it was asked once, and told that nobody waits; then it rests
    remote.fault = ""
    clock.now += 1
    (await two[0].begin(limited, is_change=False))()


async def test_what_is_counted_in_too_late_is_counted_out(two: list[SharedMeter], remote: Remote, clock: Clock) -> None:
    """And so is what had begun before, while nobody can be asked."""
    limited = {"key": Limits(concurrent_requests=1, tokens_per_minute=100)}
    end = await two[0].begin(limited, is_change=False)
    remote.fault = "late"
    for ask in (partial(two[0].begin, is_change=False), partial(two[0].reserve, num_tokens=100)):
        with pytest.raises(LimitReachedError):
            await ask(limited)
        clock.now += 1
    end()
    with pytest.raises(LimitReachedError):
        await two[1].begin(limited, is_change=False)
    remote.fault = ""
    clock.now += 1
    await two[0].begin(limited, is_change=False)
    await two[1].reserve(limited, 100)


async def test_who_is_not_limited_does_not_wait_for_who_is(two: list[SharedMeter], remote: Remote) -> None:
    """Nor does anything else on the event loop, however slow the actor is; and who leaves is counted out."""
    remote.fault = "silent"
    limited = {"key": Limits(concurrent_requests=1)}
    asked = asyncio.ensure_future(two[0].begin(limited, is_change=False))
    while not remote.num_calls:
        await asyncio.sleep(0)
    await two[0].begin({"key": Limits()}, is_change=False)
    assert not asked.done()
    asked.cancel()
    await asyncio.wait({asked})
    assert asked.cancelled()
    remote.fault = ""
    await two[1].begin(limited, is_change=False)


async def test_many_who_wait_look_for_it_once(remote: Remote, clock: Clock) -> None:
    looks: list[int] = []

    def find() -> Remote:
        looks.append(1)
        return remote

    meter = SharedMeter("a", find, clock)
    limited = {"key": Limits(requests_per_minute=10)}
    await asyncio.gather(*(meter.begin(limited, is_change=False) for _ in range(10)))
    assert looks == [1]
    with pytest.raises(LimitReachedError):
        await meter.begin(limited, is_change=False)


async def test_one_that_is_prepared_has_been_asked(two: list[SharedMeter], remote: Remote, clock: Clock) -> None:
    remote.fault = "gone"
    await two[0].prepare()
    remote.fault = ""
    clock.now += 1
    await two[0].prepare()
    assert remote.num_calls == 2


def test_the_actor_is_told_what_its_interface_says() -> None:
    """Where this is to be changed, INTERFACE is too."""
    told = {name: [*signature(of).parameters][1:] for name, of in vars(CommonMeter).items() if name[0] != "_"}
    assert (INTERFACE, told) == (
        2,
        {
            "begin": ["replica", "request", "limited", "is_change", "counted_as"],
            "end": ["request"],
            "reserve": ["replica", "tokens", "limited", "num_tokens", "counted_as"],
            "settle": ["tokens", "used"],
            "alive": ["replica"],
        },
    )


async def test_what_is_generated_for_a_request_is_reserved_by_its_name(two: list[SharedMeter]) -> None:
    caller = Caller("few", "default", frozenset(), limits=Limits(tokens_per_minute=100))
    for meter in two:
        whole: Any = SimpleNamespace(meter=meter)
        app = SimpleNamespace(state=SimpleNamespace(service=whole))
        request = Request({"type": "http", "app": app, "state": {"caller": caller}, COUNTED_AS: "first"})
        await (await _service(request)).reserve_tokens(60, "prompt")


MOST, MOST_TOKENS = 3, 20
LIMITED = {"key": Limits(concurrent_requests=2, requests_per_minute=MOST, tokens_per_minute=MOST_TOKENS)}
ASKS = st.tuples(st.integers(0, 2), st.integers(0, 12), st.sampled_from(["", "", "", "late", "gone", "silent"]))
MOVES = st.one_of(
    st.lists(ASKS, min_size=1, max_size=4).map(lambda asks: ("ask", asks)),
    st.tuples(st.just("end"), st.integers(0, 9), st.integers(0, 12)),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 10.0, 29.0, 60.0])),
    st.tuples(st.just("lose"), st.integers(0, 2)),
)


@dataclass
class Asked:
    """A request that was let in."""

    replica: int
    at: float
    num_tokens: int
    end: Callable[[], None]
    settle: Callable[[int], None]


class Cluster:
    """Three replicas, whose requests come together, leave, end, or are lost with them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.remote = Remote(CommonMeter(self.clock))
        self.meters = [self._new(number) for number in range(3)]
        self.running: list[Asked] = []
        self.begun: list[Asked] = []
        self._num_lost = 0

    def _new(self, number: int) -> SharedMeter:
        return SharedMeter(f"r{number}", lambda: self.remote, self.clock)

    async def ask(self, asks: list[tuple[int, int, str]]) -> None:
        """All at once, each with a fault of the actor's or none."""
        await asyncio.gather(*(self._one(*each) for each in asks))

    async def _one(self, number: int, num_tokens: int, fault: str) -> None:
        meter = self.meters[number]
        end = await self._asked(meter.begin(LIMITED, is_change=False), fault)
        if end is None:
            return
        reservation = await self._asked(meter.reserve(LIMITED, num_tokens), "")
        if reservation is None:
            end()
            self.begun.append(Asked(number, self.clock.now, 0, end, lambda _used: None))
            return
        asked = Asked(number, self.clock.now, num_tokens, end, reservation.settle)
        self.running.append(asked)
        self.begun.append(asked)

    async def _asked(self, asking: Coroutine[Any, Any, Any], fault: str) -> Any:
        """What it comes to, or None."""
        FAULT.set(fault)
        task, num_calls = asyncio.ensure_future(asking), self.remote.num_calls
        if fault == "silent":  # then the client goes
            while self.remote.num_calls == num_calls and not task.done():
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait({task})
        return None if task.cancelled() or task.exception() else task.result()

    def end(self, number: int, used: int) -> None:
        if self.running:
            asked = self.running.pop(number % len(self.running))
            asked.num_tokens = min(used, asked.num_tokens)
            asked.settle(used)
            asked.end()

    async def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        for meter in self.meters:
            meter.tell_alive()

    def lose(self, number: int) -> None:
        """What it had begun has gone with it; another comes."""
        self._num_lost += 1
        self.meters[number] = SharedMeter(f"r{number}-{self._num_lost}", lambda: self.remote, self.clock)
        self.running = [asked for asked in self.running if asked.replica != number]

    def check(self) -> None:
        assert len(self.running) <= 2
        now = self.clock.now
        minute = [asked for asked in self.begun if asked.at > now - WINDOW_SECONDS]
        assert len(minute) <= MOST
        assert sum(asked.num_tokens for asked in minute) <= MOST_TOKENS


@given(st.lists(MOVES, max_size=25))
def test_no_minute_and_no_moment_has_more_than_the_limit(moves: list[Any]) -> None:
    """However asks of three replicas fall together, are late, unanswered, or left; and none of it is lost for good."""

    async def run() -> None:
        cluster = Cluster()
        for what, *args in moves:
            done = getattr(cluster, what)(*args)
            if done is not None:
                await done
            cluster.check()
        while cluster.running:
            cluster.end(0, 0)
        await cluster.wait(WINDOW_SECONDS)
        await cluster.ask([(number, MOST_TOKENS // 2, "") for number in range(2)])
        assert len(cluster.running) == 2

    asyncio.run(run())
