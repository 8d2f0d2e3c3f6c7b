"""What a request holds from when it was let in: all of it goes back, in one place and once, however far it came."""

import math
from contextlib import suppress
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaplora_adapters.registry.index import Index, NamedVersions
from swaplora_adapters.registry.leases import Lease
from swaplora_adapters.store.records import Alias, Target, VersionRecord
from swaplora_server.end_rate import MAX_RETRY_SECONDS, MIN_RETRY_SECONDS, RATE_SECONDS
from swaplora_server.service.adapter_mix import MixTerm, wanted_by
from swaplora_server.service.admission import Admission, Admissions
from swaplora_server.service.errors import RequestError

RECORD = VersionRecord("sql", 1, "sha256:" + "a" * 64, 8, ("q_proj",), None, 10, 100, 0.0, "upload", (), None)


class FullRegistry:
    """Has no memory for anybody's weights."""

    def lease_weights(self, _leases: object, **_how: object) -> Any:
        raise MemoryError


def leases(count: int) -> tuple[list[Lease], list[Lease]]:
    """So many leases, and those of them that are given back."""
    given_back: list[Lease] = []
    return [Lease(RECORD, given_back.append) for _ in range(count)], given_back


def test_no_more_sequences_are_let_in_than_the_limit_until_some_are_back() -> None:
    admissions = Admissions(0, 5)
    first = admissions.admit(3)
    with pytest.raises(RequestError, match="too many requests"):
        admissions.admit(3)
    admissions.admit(2)
    first.release()
    admissions.admit(3)


def test_what_is_held_goes_back_once() -> None:
    admission, (held, given_back) = Admissions(0, 1).admit(1), leases(2)
    for lease in held:
        admission.hold(lease)
    admission.release()
    assert given_back == held
    with pytest.raises(RuntimeError, match="twice"):
        admission.release()
    assert given_back == held


def test_a_request_of_the_base_is_counted_out_once() -> None:
    admissions = Admissions(0, 2)
    admission, _other = admissions.admit(1), admissions.admit(1)
    admission.release()
    with pytest.raises(RuntimeError, match="twice"):
        admission.release()
    admissions.admit(1)
    with pytest.raises(RequestError):
        admissions.admit(1)


def test_leases_go_back_when_there_is_no_memory_for_their_weights() -> None:
    admission, (held, given_back) = Admissions(0, 1).admit(1), leases(2)
    for lease in held:
        admission.hold(lease)
    with pytest.raises(MemoryError):
        admission.claim_memory(FullRegistry())  # type: ignore[arg-type]
    admission.release()
    assert given_back == held


def test_the_last_part_of_a_request_gives_everything_back() -> None:
    admissions = Admissions(0, 3)
    admission, ((lease,), given_back) = admissions.admit(3), leases(1)
    admission.hold(lease)
    end_of_part = admission.release_after(3)
    for _ in range(2):
        end_of_part()
        assert not given_back
        with pytest.raises(RequestError):
            admissions.admit(1)
    end_of_part()
    assert given_back == [lease]
    admissions.admit(3)


def admitted(admissions: Admissions, tenant: str, wanted: str, most: int = 1000) -> list[Admission]:
    """As many as it gets."""
    own: list[Admission] = []
    with suppress(RequestError):
        while len(own) < most:
            own.append(admissions.admit(1, tenant, wanted))
    return own


@pytest.mark.parametrize(
    ("of", "first", "then"), [("tenants", [40, 8, 4, 2], [4, 8, 2, 2]), ("adapters", [40, 5, 3, 2], [5, 5, 1, 1])]
)
def test_one_who_floods_leaves_places_to_others(of: str, first: list[int], then: list[int]) -> None:
    admissions = Admissions(30, 10)
    names = [("", "sql"), ("acme", "sql"), ("beta", "sql"), ("zeta", "sql")]
    if of == "adapters":
        names = [("", "sql"), ("", "json"), ("", "base"), ("", "fr")]
    held = [admitted(admissions, *name) for name in names]
    assert [len(own) for own in held] == first
    for admission in [*held[0][:10], *held[1]]:
        admission.release()
    assert [len(admitted(admissions, *name)) for name in names] == then


def test_a_tenant_has_no_more_places_by_asking_for_many_adapters() -> None:
    admissions = Admissions(30, 10)
    admitted(admissions, "acme", "sql")
    admitted(admissions, "beta", "sql")
    names = [f"adapter {number}" for number in range(100)]
    assert sum(len(admitted(admissions, "acme", name)) for name in names) == 10 - 8, "a quarter of all, for adapters"
    assert sum(len(admitted(admissions, "beta", name)) for name in names) == 0
    assert len(admitted(admissions, "zeta", "sql")) == 3


def test_one_host_gets_no_more_places_by_the_addresses_of_its_network() -> None:
    """Of IPv6 it has a /64."""
    admissions = Admissions(30, 10)
    num_admitted = sum(len(admitted_at(admissions, f"2001:db8::{number:x}")) for number in range(1, 100))
    assert num_admitted == len(admitted_at(Admissions(30, 10), "2001:db8::1"))
    for peer in ("2001:db8:0:1::1", "192.0.2.1", "192.0.2.2"):
        assert admissions.admit(1, peer=peer)
    both = Admissions(30, 10)
    assert admitted_at(both, "::ffff:192.0.2.3")
    assert both.admit(1, peer="::ffff:192.0.2.4"), "of IPv4, though told in another way"


def admitted_at(admissions: Admissions, peer: str) -> list[Admission]:
    """As many as one address gets, one at a time."""
    found = []
    with suppress(RequestError):
        while True:
            found.append(admissions.admit(1, peer=peer))
    return found


class Names:
    """Of a service what knows names: three adapters, and an alias of each of the first two."""

    def __init__(self) -> None:
        self.names = self
        self.registry = self
        self.index = Index()
        for name in ("sql", "a", "b"):
            record = replace(RECORD, name=name)
            self.index.put(name, NamedVersions(record, (record,), is_pinned=False))
        self.index.put_alias(Alias("stable", (Target("sql@1", 9), Target("a", 1))))
        self.index.put_alias(Alias("newest", (Target("a", 1),)))
        self.index.put_alias(Alias("moved", (Target("a", 0), Target("sql", 1), Target("b", 9))))
        self.index.put_alias(Alias("nowhere", (Target("gone", 1),)))

    def reference(self, model: str) -> str:
        return f"base:{model.removeprefix('tiny:')}" if model.startswith("tiny:") else model

    def is_base(self, model: str) -> bool:
        return model == "tiny"


def test_no_places_are_had_by_writing_the_same_in_other_words_and_the_base_has_its_own() -> None:
    service: Any = Names()

    def wanted(model: str, *names: str) -> str:
        return wanted_by(service, model, [MixTerm(name) for name in names])

    one = [wanted("sql"), wanted("tiny:sql@2"), wanted("tiny", "sql"), wanted("tiny", "sql", "sql@1"), wanted("stable")]
    sums = [wanted("tiny", *names) for names in (["a", "b"], ["b", "a"], ["a", "a", "b"], ["a", "c"], ["sql", "a"])]
    assert {*one} == {"sql"}
    assert wanted("newest") == wanted("a") == "a"
    assert wanted("moved") == "b", "where most of it leads, and not where nothing does"
    nobody = [wanted("gone"), wanted("other@3"), wanted("nowhere"), wanted("tiny", "gone", "other")]
    assert len({wanted("tiny"), wanted("sql"), *sums, *nobody}) == 4
    admissions = Admissions(30, 10)
    many = [wanted("tiny", one, other) for one in ("sql", "a", "b") for other in ("sql", "a", "b") if one != other]
    assert sum(len(admitted(admissions, "", name)) for name in many) == 40
    assert len(admitted(admissions, "", wanted("tiny"))) > 0


def test_a_tenant_alone_with_a_hundred_adapters_leaves_places_to_another() -> None:
    admissions = Admissions(30, 10)
    assert sum(len(admitted(admissions, "acme", f"adapter {number}")) for number in range(100)) == 40 + 10
    assert len(admitted(admissions, "beta", "sql")) == 5


def test_without_keys_one_address_leaves_places_to_another_however_many_adapters_it_asks_for() -> None:
    admissions = Admissions(30, 10)
    held = []
    for number in range(100):
        with suppress(RequestError):
            held.append(admissions.admit(1, "", f"adapter {number}", "10.0.0.1"))
    assert len(held) == 40 + 10
    with pytest.raises(RequestError):
        admissions.check_room("", "10.0.0.1")
    admissions.check_room("", "10.0.0.2")
    admissions.admit(1, "", "adapter 1", "10.0.0.2")
    assert admissions.num_held() == {"": 51}


def test_an_adapter_beside_a_flood_of_its_tenant_is_let_in_whoever_else_is_here() -> None:
    admissions = Admissions(30, 10)
    admissions.admit(1, "beta")
    admitted(admissions, "acme", "sql")
    assert len(admitted(admissions, "acme", "json")) == 5


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans()), max_size=60), st.integers(0, 30))
def test_whatever_comes_and_goes_counts_agree_and_no_more_than_the_most(
    asked: list[tuple[int, int, bool]], limit: int
) -> None:
    admissions, held = Admissions(limit, 1), []  # type: tuple[Admissions, list[tuple[Admission, int]]]
    for name, number, ends_one in asked:
        with suppress(RequestError):
            held.append((admissions.admit(number, str(name % 2), str(name)), number))
        if ends_one and held:
            held.pop(0)[0].release()
        assert admissions.num_sequences == sum(number for _, number in held) <= (limit + 1) * 11 // 8
    while held:
        held.pop()[0].release()
    assert admissions.num_sequences == 0
    admissions.admit(limit + 1)


@pytest.mark.parametrize("per_second", [0.1, 2, 5, 20, 1000])
def test_no_more_are_let_in_than_would_begin_in_time_or_than_half_of_those_that_run(per_second: float) -> None:
    now = [100.0]
    admissions = Admissions(90, 10, 5, clock=lambda: now[0])
    held = [admissions.admit(1, "", "sql") for _ in range(11)]
    for _ in range(400):
        now[0] += 1 / per_second
        held.pop(0).release()
        held.append(admissions.admit(1, "", "sql"))
    waiting, in_time = 1 + len(admitted(admissions, "", "sql")), math.ceil(5 * per_second)
    assert min(90, max(5, in_time)) <= waiting <= min(90, max(5, in_time + 2))


@pytest.mark.parametrize(("seconds", "num_waiting"), [(0, 5), (5, 5), (30, 30), (86_400, 90), (None, 90)])
def test_a_surge_does_not_fill_all_places_before_it_is_known_how_fast_they_get_free(
    seconds: float | None, num_waiting: int
) -> None:
    admissions = Admissions(90, 10, seconds)
    assert len(admitted(admissions, "", "sql")) == 10 + num_waiting


@pytest.mark.parametrize("run_seconds", [2, 7, 20])
def test_after_a_surge_the_last_begins_within_the_longest_wait(run_seconds: float) -> None:
    """Of three times what can be done, for long enough to know how much that is."""
    now, wait_seconds, num_places, numbers, random = 0.0, 5.0, 64, count(), Random(0)
    running: list[tuple[float, int, Admission]] = []
    waiting: list[Admission] = []
    admissions = Admissions(10_000, num_places, wait_seconds, clock=lambda: now)
    end = 30 + 3 * run_seconds
    while now < end or waiting:
        now += run_seconds / num_places / 3
        while running and running[0][0] <= now:
            heappop(running)[-1].release()
        if now < end:
            with suppress(RequestError):
                waiting.append(admissions.admit(1, "", "sql"))
        while waiting and len(running) < num_places:
            heappush(running, (now + run_seconds * random.uniform(0, 2), next(numbers), waiting.pop(0)))
    assert now - end <= 1.2 * max(wait_seconds, run_seconds / 2)


def test_who_holds_none_is_let_in_although_far_more_are_here_than_would_begin_in_time() -> None:
    """As where the answers have become longer: whoever they are of is not let in until they have ended."""
    now = [100.0]
    admissions = Admissions(90, 10, 100, clock=lambda: now[0])
    admitted(admissions, "acme", "sql")
    now[0] += 200
    for _ in range(10):
        admissions.admit(1, "beta").release()
    assert admitted(admissions, "acme", "sql") == []
    assert len(admitted(admissions, "beta", "sql")) == 5, "of ten that run, half"
    assert len(admitted(admissions, "acme", "json")) == 2, "of a tenant's half, half"
    assert len(admitted(admissions, "zeta", "sql")) == 3, "a third"


@pytest.mark.parametrize("of", ["tenants", "adapters"])
def test_who_asks_for_less_than_its_share_of_what_runs_is_let_in_beside_a_flood(of: str) -> None:
    now = [100.0]
    admissions = Admissions(256, 64, 5, clock=lambda: now[0])
    flood, other = (("acme", "sql"), ("beta", "sql") if of == "tenants" else ("acme", "json"))
    held = [admissions.admit(1, *flood) for _ in range(65)]
    for _ in range(100):
        now[0] += 0.2
        held.pop(0).release()
        held.append(admissions.admit(1, *flood))
    assert 65 + len(admitted(admissions, *flood)) == 64 + 32
    assert len(admitted(admissions, *other)) == 32
    assert len(admitted(admissions, *flood)) == 0


@given(
    st.lists(st.tuples(st.sampled_from(["", "acme", "beta"]), st.sampled_from(["sql", "json"]), st.integers(1, 9))),
    st.sampled_from([None, 1.0]),
)
def test_who_is_refused_before_it_is_known_what_for_would_have_been_refused_for_anything(
    asked: list[tuple[str, str, int]], seconds: float | None
) -> None:
    admissions = Admissions(6, 4, seconds)
    for tenant, wanted, number in asked:
        with suppress(RequestError):
            admission = admissions.admit(number, tenant, wanted)
            if number == 9:
                admission.release()
        for other in ("", "acme", "beta", "zeta"):
            try:
                admissions.check_room(other)
            except RequestError:
                for name in ("sql", "json", "fr"):
                    with pytest.raises(RequestError):
                        admissions.admit(1, other, name)
            else:
                with suppress(RequestError):
                    admissions.admit(1, other, "fr").release()
                    continue
                assert admissions.num_held()[other] == admissions.num_sequences  # it is alone


def test_who_is_refused_is_told_when_those_who_wait_will_have_begun() -> None:
    now = [100.0]
    admissions = Admissions(40, 10, clock=lambda: now[0])
    held = admitted(admissions, "", "sql")
    assert refused_for(admissions) == MIN_RETRY_SECONDS  # none has ended yet
    for _ in range(20):
        now[0] += 0.5
        held.pop().release()
        held.append(admissions.admit(1, "", "sql"))
    assert refused_for(admissions) == math.ceil(40 / (20 / 10))
    now[0] += RATE_SECONDS
    held.pop().release()
    held.append(admissions.admit(1, "", "sql"))
    assert refused_for(admissions) == MAX_RETRY_SECONDS
    now[0] += RATE_SECONDS + 1
    assert refused_for(admissions) == MIN_RETRY_SECONDS  # nothing is known


def refused_for(admissions: Admissions) -> int | None:
    """Of seconds, as a refused request is told."""
    with pytest.raises(RequestError, match="too many requests") as caught:
        admissions.admit(1, "", "sql")
    return caught.value.retry_seconds


def test_how_fast_requests_end_is_not_known_where_none_waits() -> None:
    """Then they end as fast as they come: after few of them a burst is let in as on a server that has just begun."""
    now = [100.0]
    admissions = Admissions(40, 10, 30.0, clock=lambda: now[0])
    for _ in range(3):
        now[0] += 8
        admissions.admit(1, "", "sql").release()
    assert len(admitted(admissions, "", "sql")) == 10 + 30
    assert refused_for(admissions) == MIN_RETRY_SECONDS


def test_requests_that_fail_before_they_run_do_not_count_as_served() -> None:
    now = [100.0]
    admissions = Admissions(40, 10, 1.0, clock=lambda: now[0])
    held = [admissions.admit(1, "", "sql") for _ in range(11)]
    for _ in range(200):
        now[0] += 0.01
        admissions.admit(1, "", "nobody").release(has_run=False)
    held.pop().release()  # one that was served
    held += admitted(admissions, "", "sql")
    assert len(held) == 10 + 5, "at 100 a second it would be all"
