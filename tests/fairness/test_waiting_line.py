"""Who begins next: everybody who asks, each tenant and each of its adapters by what it was served, the rest by age."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_harness import adapter
from swaplora_server.engine.request import Request, SamplingParams, Sequence
from swaplora_server.engine.scheduling.waiting_line import GENERATED_WEIGHT, PROMPT_WEIGHT, WaitingLine

MAX_PROMPT, MAX_TOKENS = 20, 12
TENANTS = ("", "acme", "beta")
ADAPTERS = ("", "sql", "json")
Key = tuple[str, str]

keys = st.tuples(st.sampled_from(TENANTS), st.sampled_from(ADAPTERS))
asked = st.tuples(keys, st.integers(1, MAX_PROMPT), st.integers(1, MAX_TOKENS), st.sampled_from((0, 0, 0, -1, 3)))


def sequence_of(key: Key, prompt: int, max_tokens: int, priority: int = 0) -> Sequence:
    tenant, name = key
    adapters = (adapter(name),) if name else ()
    params = SamplingParams(max_tokens)
    return Sequence(
        Request("r", (1,) * prompt, params, lambda _event: None, adapters, tenant=tenant, priority=priority), 0
    )


def key_of(sequence: Sequence) -> Key:
    request = sequence.request
    return request.tenant, "".join(request.digests)


@dataclass
class Places:
    """A server without a model: so many may run at once, each generates one token a step."""

    num_places: int
    line: WaitingLine = field(default_factory=WaitingLine)
    running: dict[Sequence, int] = field(default_factory=dict)  # tokens that it has yet to generate
    begun: list[Sequence] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)  # by tenant, and by tenant and adapter

    def begin(self) -> list[Sequence]:
        begun: list[Sequence] = []
        for sequence in self.line.turns():
            if len(self.running) == self.num_places:
                break
            self.line.remove(sequence)
            self._charge(sequence, len(sequence.request.prompt_ids), PROMPT_WEIGHT)
            self.running[sequence] = sequence.request.params.max_tokens
            begun.append(sequence)
        self.begun += begun
        return begun

    def generate(self) -> None:
        for sequence in list(self.running):
            self._charge(sequence, 1, GENERATED_WEIGHT)
            self.running[sequence] -= 1
            if not self.running[sequence]:
                del self.running[sequence]

    def _charge(self, sequence: Sequence, num_tokens: int, weight: int) -> None:
        self.line.charge(sequence, num_tokens, weight)
        tenant, name = key_of(sequence)
        self.served.update({tenant: num_tokens * weight, f"{tenant} {name}": num_tokens * weight})


@given(st.lists(asked, max_size=30), st.integers(1, 4))
def test_all_who_wait_have_a_turn_and_each_line_goes_by_priority_and_age(
    asked: list[tuple[Key, int, int, int]], num_charged: int
) -> None:
    line = WaitingLine()
    sequences = [sequence_of(*one) for one in asked]
    for sequence in sequences:
        line.add(sequence)
    turns = []
    for number, sequence in enumerate(line.turns()):
        turns.append(sequence)
        if number < num_charged:
            line.remove(sequence)
            line.charge(sequence, 5, PROMPT_WEIGHT)
    assert Counter(turns) == Counter(sequences)
    assert set(line) == set(turns[num_charged:])
    for key in {key_of(sequence) for sequence in sequences}:
        places = [(one.priority, one.arrival) for one in turns if key_of(one) == key]
        assert places == sorted(places)
    for tenant in TENANTS:
        priorities = [one.priority for one in turns if one.request.tenant == tenant]
        assert priorities == sorted(priorities)


@settings(max_examples=100)
@given(st.lists(asked, min_size=1, max_size=40), st.integers(1, 5))
def test_whatever_is_asked_all_of_it_begins_and_no_place_is_empty_while_somebody_waits(
    asked: list[tuple[Key, int, int, int]], num_places: int
) -> None:
    places = Places(num_places)
    for number, one in enumerate(asked):
        places.line.add(sequence_of(*one))
        if number % 3 == 0:
            places.begin()
            places.generate()
    for _ in range(len(asked) * MAX_TOKENS):
        places.begin()
        assert len(places.running) == num_places or not len(places.line)
        places.generate()
    assert len(places.begun) == len(asked)


@pytest.mark.parametrize("of", ["tenants", "adapters"])
@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, MAX_PROMPT), st.integers(1, MAX_TOKENS)), min_size=2, max_size=2),
    st.integers(1, 5),
    st.integers(1, 60),
)
def test_between_two_who_always_wait_no_more_is_the_difference_than_what_runs(
    of: str, sizes: list[tuple[int, int]], num_places: int, num_steps: int
) -> None:
    """Be the requests of one ever so much larger than the other's."""
    sharing: list[Key] = [("acme", "sql"), ("beta", "sql")] if of == "tenants" else [("acme", "sql"), ("acme", "json")]
    names = ["acme", "beta"] if of == "tenants" else ["acme sql", "acme json"]
    places = Places(num_places)
    for key, size in zip(sharing, sizes, strict=True):
        for _ in range(num_places + 1):
            places.line.add(sequence_of(key, *size))
    most = max(PROMPT_WEIGHT * prompt + GENERATED_WEIGHT * tokens for prompt, tokens in sizes)
    for _ in range(num_steps):
        for sequence in places.begin():
            size = len(sequence.request.prompt_ids), sequence.request.params.max_tokens
            places.line.add(sequence_of(key_of(sequence), *size))
        places.generate()
        assert abs(places.served[names[0]] - places.served[names[1]]) <= (num_places + 1) * most


@settings(max_examples=100)
@given(st.lists(asked, min_size=5, max_size=40), keys, st.integers(0, 10))
def test_one_who_had_nobody_waiting_begins_before_any_other_tenant_begins_two(
    asked: list[tuple[Key, int, int, int]], key: Key, num_steps: int
) -> None:
    """And however long it asked for nothing: it has no debt beside those who were served less, and no credit."""
    places = Places(1)
    for one in asked:
        if one[0][0] != key[0]:
            places.line.add(sequence_of(*one))
    for _ in range(num_steps):
        places.begin()
        places.generate()
    newcomer, num_begun = sequence_of(key, 1, 1), len(places.begun)
    places.line.add(newcomer)
    while newcomer not in places.begun:
        places.begin()
        places.generate()
    assert max(Counter(one.request.tenant for one in places.begun[num_begun:]).values()) == 1


def test_time_without_anybody_waiting_is_no_credit() -> None:
    places = Places(1)
    places.line.add(sequence_of(("beta", ""), 1, 1))
    for _ in range(20):
        places.line.add(sequence_of(("acme", ""), 10, 1))
    for _ in range(10):
        places.begin()
        places.generate()
    for _ in range(10):
        places.line.add(sequence_of(("beta", ""), 10, 1))
    first = len(places.begun)
    for _ in range(10):
        places.begin()
        places.generate()
    tenants = [one.request.tenant for one in places.begun[first:]]
    assert all(one != other for one, other in pairwise(tenants))


def test_one_that_waits_again_goes_before_those_of_its_line_that_came_later() -> None:
    line = WaitingLine()
    first, *others = [sequence_of(("acme", "sql"), 3, 3) for _ in range(3)]
    for sequence in [*others, first]:
        line.add(sequence)
    assert list(line.turns()) == [first, *others]


def test_a_low_priority_moves_nobody_before_another_tenant() -> None:
    line = WaitingLine()
    for _ in range(4):
        line.add(sequence_of(("acme", "sql"), 5, 5))
        line.add(sequence_of(("beta", "sql"), 5, 5, priority=-1000))
    tenants = []
    for sequence in line.turns():
        line.remove(sequence)
        line.charge(sequence, 5, PROMPT_WEIGHT)
        tenants.append(sequence.request.tenant)
    assert tenants == ["acme", "beta"] * 4


def test_those_who_ask_no_more_are_forgotten() -> None:
    places = Places(4)
    for number in range(1000):
        places.line.add(sequence_of(("acme", str(number)), 5, 2))
        places.begin()
        places.generate()
    accounts = places.line._tenants.account("acme").lines  # noqa: SLF001 - it cannot be seen but by its memory
    assert len(accounts) < 20


def test_of_one_line_alone_the_order_is_that_of_arrival_whatever_it_was_served() -> None:
    places, came = Places(2), defaultdict(list)
    for number in range(20):
        sequence = sequence_of(("", ""), 1 + number % 7, 1 + number % 3)
        came[key_of(sequence)].append(sequence)
        places.line.add(sequence)
    while len(places.line):
        places.begin()
        places.generate()
    assert places.begun == came["", ""]
