"""What replicas count together is counted once, and what a lost one had begun ends with it."""

from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from swaplora_server.access.limits import LimitReachedError, Limits
from swaplora_server.cluster.meter import SILENT_SECONDS, CommonMeter, SharedMeter


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Remote:
    """An actor's handle, whose calls are made here; or fail."""

    def __init__(self, meter: CommonMeter) -> None:
        self._meter = meter
        self.is_gone = False
        self.is_late = False  # does what it is told, after nobody waits for it any more
        self.num_calls = 0

    def __getattr__(self, method: str) -> Any:
        return Call(self, getattr(self._meter, method))


class Call:
    def __init__(self, remote: Remote, method: Any) -> None:
        self._remote, self._method = remote, method

    def remote(self, *args: Any) -> "Call":
        self._remote.num_calls += 1
        self._future: Future[Any] = Future()
        if self._remote.is_gone:
            self._future.set_exception(ConnectionError("gone"))
            return self
        told = self._method(*args)
        if self._remote.is_late:
            self._future.set_exception(TimeoutError())
        else:
            self._future.set_result(told)
        return self

    def future(self) -> "Future[Any]":
        return self._future


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def remote(clock: Clock) -> Remote:
    return Remote(CommonMeter(clock))


@pytest.fixture
def two(remote: Remote, clock: Clock) -> list[SharedMeter]:
    return [SharedMeter(name, lambda: remote, clock) for name in ("a", "b")]


def test_a_limit_is_that_of_all_replicas(two: list[SharedMeter], clock: Clock) -> None:
    limited = {"tenant": Limits(requests_per_minute=3)}
    for number in range(3):
        two[number % 2].begin(limited, is_change=False)
    for meter in two:
        with pytest.raises(LimitReachedError, match="tenant has 3 requests a minute") as reached:
            meter.begin(limited, is_change=False)
        assert reached.value.retry_seconds == 60
    clock.now += 60
    two[1].begin(limited, is_change=False)


def test_what_ends_is_counted_out_once(two: list[SharedMeter]) -> None:
    limited = {"key": Limits(concurrent_requests=2)}
    ends = [meter.begin(limited, is_change=False) for meter in two]
    ends[0]()
    ends[0]()
    two[1].begin(limited, is_change=False)
    with pytest.raises(LimitReachedError):
        two[0].begin(limited, is_change=False)


def test_tokens_that_are_not_used_go_back(two: list[SharedMeter]) -> None:
    limited = {"key": Limits(tokens_per_minute=100)}
    two[0].reserve(limited, 90).settle(10)
    two[1].reserve(limited, 90)
    with pytest.raises(LimitReachedError) as reached:
        two[0].reserve(limited, 101)
    assert reached.value.retry_seconds is None


def test_what_a_lost_replica_had_begun_ends(two: list[SharedMeter], clock: Clock) -> None:
    """And not what one has begun that is only silent for a while, or long at work."""
    limited = {"key": Limits(concurrent_requests=2)}
    for meter in two:
        meter.begin(limited, is_change=False)
    for _ in range(4):
        clock.now += SILENT_SECONDS / 2
        two[1].tell_alive()
    two[1].begin(limited, is_change=False)
    with pytest.raises(LimitReachedError):
        two[1].begin(limited, is_change=False)


def test_who_has_no_limits_asks_nobody(two: list[SharedMeter], remote: Remote) -> None:
    two[0].begin({"key": Limits(), "tenant": Limits(tokens_per_minute=5)}, is_change=True)()
    two[0].reserve({"key": Limits(requests_per_minute=5)}, 10**6).settle(3)
    two[0].tell_alive()
    assert remote.num_calls == 0


def test_nobody_is_let_in_uncounted(two: list[SharedMeter], remote: Remote, clock: Clock) -> None:
    limited = {"key": Limits(requests_per_minute=3, tokens_per_minute=3)}
    remote.is_gone = True
    with pytest.raises(LimitReachedError) as reached:
        two[0].begin(limited, is_change=False)
    assert reached.value.retry_seconds == 1
    with pytest.raises(LimitReachedError):
        two[0].reserve(limited, 1)
    assert remote.num_calls == 2  # it was asked once, and told that nobody waits; then it rests
    remote.is_gone = False
    clock.now += 1
    two[0].begin(limited, is_change=False)()


def test_what_is_counted_in_too_late_is_counted_out(two: list[SharedMeter], remote: Remote, clock: Clock) -> None:
    """And so is what had begun before, while nobody can be asked."""
    limited = {"key": Limits(concurrent_requests=1, tokens_per_minute=100)}
    end = two[0].begin(limited, is_change=False)
    remote.is_late = True
    for ask in (partial(two[0].begin, is_change=False), partial(two[0].reserve, num_tokens=100)):
        with pytest.raises(LimitReachedError):
            ask(limited)
        clock.now += 1
    end()
    with pytest.raises(LimitReachedError):
        two[1].begin(limited, is_change=False)
    remote.is_late = False
    clock.now += 1
    two[0].begin(limited, is_change=False)
    two[1].reserve(limited, 100)


def test_one_that_is_prepared_has_been_asked(two: list[SharedMeter], remote: Remote, clock: Clock) -> None:
    remote.is_gone = True
    two[0].prepare()
    remote.is_gone = False
    clock.now += 1
    two[0].prepare()
    assert remote.num_calls == 2
