"""The line for memory under any events and any traffic, against books of its own; and faults planted in it."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run

from queue_simulation import QueueSimulation
from soak import size
from swaplora_adapters.registry.residency import memory_queue
from swaplora_adapters.registry.residency.claims import Claim, Resident
from swaplora_adapters.registry.residency.memory_queue import MemoryQueue, QueueHead

Fault = Callable[[pytest.MonkeyPatch], None]
BUDGET = 6
SIZES = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 3, "f": 3, "g": 5, "h": 7}  # the last one never fits
DIGESTS = st.sampled_from(sorted(SIZES))
WANTED = st.sets(DIGESTS, min_size=1, max_size=3)
FEW = settings(
    max_examples=size(ci=60, soak=5000),
    stateful_step_count=size(ci=50, soak=150),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def sizes_of(digests: set[str] | frozenset[str]) -> dict[str, int]:
    return {digest: SIZES[digest] for digest in sorted(digests)}


class Machine(RuleBasedStateMachine):
    """Requests, ends, hang-ups, loads, failures, pins and deletes in any order; the line checks itself after each."""

    def __init__(self) -> None:
        super().__init__()
        self.line = QueueSimulation(BUDGET)

    @rule(several=st.lists(WANTED, min_size=1, max_size=3), are_loaded=st.booleans())
    def ask(self, several: list[set[str]], are_loaded: bool) -> None:
        for wanted in several:
            self.ask_for(wanted)
        for resident in self.line.loading if are_loaded else ():
            self.line.load(resident)

    def ask_for(self, wanted: set[str]) -> None:
        claim = self.line.ask(sizes_of(wanted))
        kept = self.line.queue.kept
        if sum({**kept, **claim.sizes}.values()) > BUDGET and claim not in self.line.inside:
            assert claim in self.line.refused, "waits for what it never gets"

    @precondition(lambda self: self.line.inside)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.line.leave(data.draw(st.sampled_from(self.line.inside)))

    @precondition(lambda self: self.line.waiting)
    @rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        self.line.leave(data.draw(st.sampled_from(self.line.waiting)))

    @precondition(lambda self: self.line.loading)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        self.line.load(data.draw(st.sampled_from(self.line.loading)))

    @precondition(lambda self: self.line.loading)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.line.fail(data.draw(st.sampled_from(self.line.loading)))

    @rule(pinned=st.sets(DIGESTS, max_size=2))
    def pin(self, pinned: set[str]) -> None:
        self.line.pin(sizes_of(pinned))

    @rule(digest=DIGESTS)
    def drop(self, digest: str) -> None:
        self.line.drop(digest)

    @rule(seconds=st.sampled_from([0.125, 0.25, 0.5, 1, 2, 8, 40]))
    def pass_time(self, seconds: float) -> None:
        self.line.pass_time(seconds)


def test_the_line_keeps_its_promises_whatever_happens() -> None:
    run(Machine, settings=FEW)


@dataclass(frozen=True)
class Visit:
    """A request that comes at a time, and once let in holds what it asked for; perhaps it hangs up before."""

    at: float
    wanted: frozenset[str]
    seconds: float
    patience: float | None = None


class Traffic:
    """Visits, played by their times. Loads take no time."""

    def __init__(self, visits: Iterable[Visit], wait_seconds: float) -> None:
        self.line = QueueSimulation(BUDGET, wait_seconds)
        self._moments: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._staying: dict[Claim, float] = {}  # how long it will, once it is admitted
        for visit in visits:
            self._at(visit.at, partial(self._come, visit))
        while self._moments or self.line.waiting:
            self._go_on()

    def _at(self, moment: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._moments, (moment, next(self._numbers), event))

    def _go_on(self) -> None:
        """To the next event, or to the moment before it that the queue wants to be asked at."""
        wait = self.line.queue.seconds_to_wait(self.line.now)
        next_stop = math.inf if wait is None else self.line.now + wait
        if self._moments and self._moments[0][0] <= next_stop:
            moment, _, event = heapq.heappop(self._moments)
            self.line.pass_time(moment - self.line.now)
            event()
        else:
            self.line.pass_time(next_stop - self.line.now)
        for resident in self.line.loading:
            self.line.load(resident)
        for claim in self._staying.keys() & set(self.line.inside):
            self._at(claim.admitted_at + self._staying.pop(claim), partial(self.line.leave, claim))

    def _come(self, visit: Visit) -> None:
        claim = self.line.ask(sizes_of(visit.wanted))
        self._staying[claim] = visit.seconds
        if visit.patience is not None:
            self._at(visit.at + visit.patience, partial(self._hang_up, claim))

    def _hang_up(self, claim: Claim) -> None:
        if claim in self.line.waiting:
            self.line.leave(claim)


EIGHTHS = st.integers(1, 32).map(lambda number: number / 8)
FITTING = st.sets(st.sampled_from(sorted(SIZES.keys() - {"h"})), min_size=1, max_size=2).filter(
    lambda wanted: sum(SIZES[digest] for digest in wanted) <= BUDGET
)


@st.composite
def traffics(draw: st.DrawFn) -> list[Visit]:
    """Some adapters that are asked for again and again for a minute, and requests of all kinds in between."""
    visits = [
        Visit(draw(EIGHTHS) * 4, frozenset(draw(FITTING)), draw(EIGHTHS), draw(st.none() | EIGHTHS))
        for _ in range(draw(st.integers(1, 12)))
    ]
    for _ in range(draw(st.integers(0, 3))):
        wanted, every, seconds = frozenset(draw(FITTING)), draw(EIGHTHS), draw(EIGHTHS)
        visits += [Visit(number * every, wanted, seconds) for number in range(int(60 / every))]
    return visits


def check_nobody_starves(visits: Sequence[Visit]) -> None:
    """With time without end to wait, everyone is admitted, and the first in line soon."""
    traffic = Traffic(visits, wait_seconds=1e6)
    longest = max(memory_queue.PATIENCE_SECONDS, *(visit.seconds for visit in visits))
    assert not traffic.line.refused
    assert traffic.line.longest_first <= 4 * longest


@FEW
@given(traffics())
def test_the_first_in_line_is_admitted_within_four_times_the_longest_request(visits: list[Visit]) -> None:
    check_nobody_starves(visits)


@FEW
@given(traffics(), st.sampled_from([0.0, 1.0, 4.0]))
def test_everyone_is_admitted_or_refused_in_time(visits: list[Visit], wait_seconds: float) -> None:
    line = Traffic(visits, wait_seconds).line
    assert not line.waiting
    assert line.longest_first <= wait_seconds


def never_closes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryQueue, "_drain_for", lambda *_: None)


def closes_in_vain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Resident, "has_user_admitted_by", lambda *_: False)


def closes_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QueueHead, "drain", lambda self, residents, _now: self.draining.update(residents))


def closes_too_much(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memory_queue, "_as_few_as_will_do", lambda residents, _nbytes: list(residents))


def gives_up_too_soon(patch: pytest.MonkeyPatch) -> None:
    def close(self: QueueHead, residents: Iterable[Resident], now: float) -> None:
        self.draining_until = now + memory_queue.PATIENCE_SECONDS
        self.draining.update(residents)

    patch.setattr(QueueHead, "drain", close)


def closes_for_one_and_lets_in_another(patch: pytest.MonkeyPatch) -> None:
    """What is freed for the first in line goes to whoever comes."""
    excess = MemoryQueue._excess  # noqa: SLF001
    patch.setattr(MemoryQueue, "_excess", lambda self, staying, *claims: excess(self, staying, *claims[:1]))


def lets_in_whoever_asked_last(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryQueue, "add", lambda self, claim: self._line.insert(0, claim))


def lets_nobody_pass(patch: pytest.MonkeyPatch) -> None:
    next_admitted = MemoryQueue.next_admitted

    def strictly(self: MemoryQueue, now: float) -> Claim | None:
        line, self._line = self._line, self._line[:1]
        claim = next_admitted(self, now)
        self._line = line
        if claim is not None:
            self._line.remove(claim)
        return claim

    patch.setattr(MemoryQueue, "next_admitted", strictly)


def evicts_what_is_pinned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryQueue, "_is_evictable", lambda _self, resident: resident.is_idle)


def evicts_what_is_used(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        MemoryQueue,
        "_is_evictable",
        lambda self, resident: resident.weights is not None and resident.digest not in self.kept,
    )


def forgets_what_loads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Resident, "is_idle", property(lambda self: not self.users))


def gives_room_for_one_of_several(patch: pytest.MonkeyPatch) -> None:
    """A sum comes in when the largest of its terms has room."""
    excess = MemoryQueue._excess  # noqa: SLF001

    def of_the_largest(self: MemoryQueue, staying: dict[str, int], *claims: Claim) -> int:
        def largest(claim: Claim) -> Claim:
            return Claim(dict([max(claim.sizes.items(), key=lambda item: item[1])]), claim.asked_at)

        return excess(self, staying, *map(largest, claims))

    patch.setattr(MemoryQueue, "_excess", of_the_largest)


def hopes_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryQueue, "_is_refused", lambda self, claim, now: now >= self._gives_up_at(claim))


def any_events() -> None:
    run(Machine, settings=UNTIL_FOUND)


def any_traffic() -> None:
    UNTIL_FOUND(given(traffics())(check_nobody_starves))()


UNTIL_FOUND = settings(FEW, max_examples=500, phases=[Phase.generate], database=None, report_multiple_bugs=False)
FAULTS: dict[Fault, Callable[[], None]] = {
    never_closes: any_traffic,
    closes_in_vain: any_traffic,
    closes_for_ever: any_traffic,
    closes_too_much: any_traffic,
    gives_up_too_soon: any_traffic,
    closes_for_one_and_lets_in_another: any_traffic,
    lets_in_whoever_asked_last: any_traffic,
    lets_nobody_pass: any_traffic,
    evicts_what_is_pinned: any_events,
    evicts_what_is_used: any_events,
    forgets_what_loads: any_events,
    gives_room_for_one_of_several: any_events,
    hopes_for_ever: any_events,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_the_line_is_found(fault: Fault) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        with pytest.raises((AssertionError, RuntimeError, KeyError)):
            FAULTS[fault]()
