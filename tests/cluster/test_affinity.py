"""Whom a router prefers: decided by what replicas told, what it sent them, and nothing else."""

import copy
import math
import pickle
from collections import Counter
from collections.abc import Iterable
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from swaplora_server.cluster.affinity import (
    ALWAYS,
    BOUND,
    COLD,
    PINNED_SECONDS,
    SETTLING_SECONDS,
    Affinity,
    ReplicaState,
    RouteKey,
)
from swaplora_server.cluster.exchange import Forwarded

NAMES = [f"acme~a{number}" for number in range(60)]
BASE = RouteKey()
few = settings(max_examples=40)
replica_names = st.lists(st.text("0123456789abcdef", min_size=1, max_size=8), min_size=1, max_size=12, unique=True)


def router(replicas: Iterable[str], seed: int = 0) -> Affinity:
    affinity = Affinity(Random(seed))
    affinity.set_replicas(replicas)
    return affinity


def adapter(*names: str, session: str = "") -> RouteKey:
    return RouteKey(names, session)


def state(*resident: str, ongoing: int = 0, capacity: int = 64) -> ReplicaState:
    return ReplicaState(frozenset(resident), ongoing, capacity)


def homes(affinity: Affinity) -> dict[str, str]:
    return {name: affinity.rank(adapter(name), 0.0)[0] for name in NAMES}


def send(affinity: Affinity, key: RouteKey, now: float = 0.0) -> str:
    chosen = affinity.rank(key, now)[0]
    affinity.routed(key, chosen, now)
    return chosen


@few
@given(replica_names, st.data())
def test_every_replica_is_ranked_once_whatever_is_known_of_them(replicas: list[str], data: st.DataObject) -> None:
    """So nobody is without a place to go while one is left."""
    affinity = router(replicas)
    for name in replicas:
        resident = data.draw(st.sets(st.sampled_from(NAMES[:5])))
        affinity.told(
            name, state(*resident, ongoing=data.draw(st.integers(0, 99)), capacity=data.draw(st.integers(0, 64))), 0.0
        )
    key = RouteKey(
        tuple(data.draw(st.lists(st.sampled_from(NAMES[:5]), unique=True))), data.draw(st.sampled_from(["", "s"]))
    )
    assert sorted(affinity.rank(key, 0.0)) == sorted(replicas)


def test_a_version_stays_where_it_was_sent_while_the_current_one_moves() -> None:
    """Replicas tell of current versions alone."""
    affinity = router("abc")
    home = affinity.rank(adapter("sql"), 0.0)[0]
    away = next(name for name in "abc" if name != home)
    affinity.told(away, state("sql"), 0.0)
    assert send(affinity, adapter("sql@1"), 1.0) == away  # as what its name says: it may be the current one
    affinity.completed(away)
    for second in range(2, 60):
        affinity.told(away, state(), float(second))
        affinity.told(home, state("sql"), float(second))
    assert affinity.rank(adapter("sql"), 60.0)[0] == home
    assert affinity.rank(adapter("sql@1"), 60.0)[0] == away
    assert affinity.rank(adapter("sql@2"), 60.0)[0] == home
    affinity.told(away, state(), 1 + PINNED_SECONDS)
    assert affinity.rank(adapter("sql@1"), 1 + PINNED_SECONDS)[0] == home


@few
@given(replica_names, st.integers(), st.integers())
def test_a_version_is_at_home_where_its_name_is(replicas: list[str], one: int, version: int) -> None:
    for name in NAMES[:20]:
        affinity = router(replicas, one)
        home = affinity.rank(adapter(name), 0.0)[0]
        assert [send(affinity, adapter(f"{name}@{version}")) for _ in range(1 + COLD)] == [home] * (1 + COLD)


@few
@given(replica_names, st.data())
def test_those_that_a_request_was_given_to_come_last(replicas: list[str], data: st.DataObject) -> None:
    """And the others as they would, whether they are ready or not."""
    affinity = router(replicas)
    for name in data.draw(st.lists(st.sampled_from(replicas), unique=True)):
        affinity.told(name, ReplicaState(frozenset({"a"}), 0, 64, data.draw(st.booleans())), 0.0)
    tried = data.draw(st.lists(st.sampled_from(replicas), unique=True))
    ranked = affinity.rank(adapter("a"), 0.0)
    again = affinity.rank(RouteKey(("a",), tried=tried), 0.0)
    assert again == [*(n for n in ranked if n not in tried), *(n for n in ranked if n in tried)]


def test_nobody_is_ranked_where_nobody_is() -> None:
    assert [router([]).rank(key, 0.0) for key in (BASE, adapter("a"), RouteKey((), "s"))] == [[], [], []]


@few
@given(replica_names, st.integers(), st.integers())
def test_two_routers_find_the_same_home_without_talking(replicas: list[str], one: int, other: int) -> None:
    assert homes(router(replicas, one)) == homes(router(reversed(replicas), other))


@few
@given(replica_names.filter(lambda names: len(names) > 1), st.data())
def test_a_lost_replica_moves_its_own_adapters_alone(replicas: list[str], data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from(replicas))
    affinity = router(replicas)
    before = homes(affinity)
    affinity.set_replicas([name for name in replicas if name != lost])
    after = homes(affinity)
    assert {name for name in NAMES if after[name] != before[name]} == {name for name in NAMES if before[name] == lost}


@few
@given(replica_names.filter(lambda names: "new" not in names))
def test_a_new_replica_takes_its_own_adapters_alone(replicas: list[str]) -> None:
    affinity = router(replicas)
    before = homes(affinity)
    affinity.set_replicas([*replicas, "new"])
    after = homes(affinity)
    assert {after[name] for name in NAMES if after[name] != before[name]} <= {"new"}


def test_homes_are_spread_evenly() -> None:
    counts = Counter(router("abcdefgh").rank(adapter(f"a{number}"), 0.0)[0] for number in range(8000))
    assert min(counts.values()) > 850
    assert max(counts.values()) < 1150


def test_a_new_replica_takes_what_is_in_memory_elsewhere_until_it_has_the_mean_to_do() -> None:
    """Else scaling up would help nobody whose adapters are all in memory already."""
    affinity = router("abcdefgh")
    before = homes(affinity)
    for name in "abcdefgh":
        affinity.told(name, state(*(a for a in NAMES if before[a] == name), ongoing=10), 0.0)
    affinity.set_replicas("abcdefghi")
    own = {name for name in NAMES if router("abcdefghi").rank(adapter(name), 0.0)[0] == "i"}
    assert {name for name in NAMES if affinity.rank(adapter(name), 0.0)[0] == "i"} == own
    affinity.told("i", state(ongoing=10), 1.0)
    assert homes(affinity) == before


@few
@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=200), st.integers(0, 5))
def test_no_replica_has_more_than_the_bound_of_what_one_router_sends(
    num_replicas: int, requests: list[tuple[int, bool]], seed: int
) -> None:
    affinity, running = router(map(str, range(num_replicas)), seed), Counter[str]()
    random = Random(seed)
    for number, does_one_end in requests:
        if does_one_end and running.total():
            ended = random.choice(list(running.elements()))
            affinity.completed(ended)
            running[ended] -= 1
        running[send(affinity, adapter(NAMES[number]))] += 1
        assert max(running.values()) <= max(ALWAYS, math.ceil(BOUND * running.total() / num_replicas))


@few
@given(st.lists(st.integers(0, 40), min_size=2, max_size=9), st.sampled_from(NAMES), st.sets(st.integers(0, 8)))
def test_a_loaded_replica_is_passed_whatever_it_has_in_memory(loads: list[int], name: str, warm: set[int]) -> None:
    affinity = router(map(str, range(len(loads))))
    for number, load in enumerate(loads):
        affinity.told(str(number), state(*([name] if number in warm else []), ongoing=load), 0.0)
    bound = max(ALWAYS, math.ceil(BOUND * (sum(loads) + 1) / len(loads)))
    ranked = [loads[int(replica)] < bound for replica in affinity.rank(adapter(name), 0.0)]
    assert ranked == sorted(ranked, reverse=True)
    assert ranked[0]


def test_replicas_are_loaded_by_what_they_can_do() -> None:
    affinity = router("ab")
    affinity.told("a", state(capacity=192), 0.0)
    affinity.told("b", state(capacity=64), 0.0)
    counts = Counter(send(affinity, adapter(name)) for name in NAMES)
    assert counts["b"] <= math.ceil(BOUND * len(NAMES) / 4)
    assert counts["a"] / len(NAMES) >= 0.6


def test_what_was_sent_counts_at_once() -> None:
    """Both the request and its adapter, long before the replica tells of them."""
    affinity = router("abcd")
    sum_of_two = adapter("x", "y")
    first = send(affinity, sum_of_two)
    assert affinity.rank(adapter("x"), 0.0)[0] == first
    assert affinity.rank(adapter("y"), 0.0)[0] == first
    for _ in range(9):
        assert affinity.rank(BASE, 0.0)[0] != first or affinity.rank(BASE, 0.0)[-1] != first


def test_what_a_replica_does_not_tell_of_in_time_is_not_there() -> None:
    affinity = router("ab")
    home, other = affinity.rank(adapter("x"), 0.0)
    affinity.routed(adapter("x"), other, 0.0)
    affinity.completed(other)
    affinity.told(other, state(), SETTLING_SECONDS - 1)
    assert affinity.rank(adapter("x"), 0.0) == [other, home]
    affinity.told(other, state(), SETTLING_SECONDS + 1)
    assert affinity.rank(adapter("x"), 0.0) == [home, other]


def test_a_replica_that_has_it_comes_before_a_home_that_lost_it() -> None:
    affinity = router("abcd")
    *_, last = affinity.rank(adapter("x"), 0.0)
    affinity.told(last, state("x"), 0.0)
    assert affinity.rank(adapter("x"), 0.0)[0] == last


def test_an_ended_request_is_no_load() -> None:
    affinity = router("ab")
    for _ in range(100):
        affinity.completed(send(affinity, adapter("x")))
    affinity.completed("a")  # one more than there were
    affinity.completed("gone")
    assert len({send(affinity, adapter("x")) for _ in range(COLD)}) == 1


def test_a_hot_adapter_has_as_many_homes_as_its_share_needs_and_no_more() -> None:
    """Two in a hundred requests make 0.16 of what one of eight replicas serves: two homes. Half as many have one."""
    affinity, random = router("abcdefgh"), Random(1)
    running: list[str] = []
    served: dict[str, Counter[str]] = {"hot": Counter(), "cool": Counter()}
    for step in range(6000):
        drawn = random.random()
        name = "hot" if drawn < 0.02 else "cool" if drawn < 0.03 else random.choice(NAMES)
        chosen = send(affinity, adapter(name), step / 100)
        running.append(chosen)
        if step > 1000 and name in served:
            served[name][chosen] += 1
        if len(running) > 80:
            affinity.completed(running.pop(random.randrange(len(running))))
    (_, one), (_, two), *rest = served["hot"].most_common()
    assert two > 0.2 * (one + two)
    assert sum(count for _, count in rest) <= 0.1 * served["hot"].total()
    assert served["cool"].most_common(1)[0][1] >= 0.8 * served["cool"].total()


def test_one_client_alone_stays_where_its_adapter_is() -> None:
    """All of the traffic is no reason to load an adapter twice while nobody waits."""
    affinity = router("abcdefgh")
    replicas = set()
    for step in range(200):
        replicas.add(chosen := send(affinity, adapter("x"), step))
        affinity.completed(chosen)
    assert len(replicas) == 1


def test_a_hot_adapter_is_loaded_again_when_that_is_less_than_to_wait() -> None:
    affinity = router("ab")
    for step in range(100):
        affinity.completed(send(affinity, adapter("x"), step / 100))
    counts = Counter(send(affinity, adapter("x"), 1.0) for _ in range(20))
    assert abs(counts["a"] - counts["b"]) <= COLD


@few
@given(st.permutations("abc"), st.integers(0, 2))
def test_several_adapters_go_by_the_rarest_then_by_the_others(members: list[str], rarest: int) -> None:
    """Two have the rarest, one of them another member as well; the rest have all but the rarest."""
    affinity = router("0123456")
    name = members[rarest]
    others = [member for member in members if member != name]
    affinity.told("0", state(name), 0.0)
    affinity.told("1", state(name, others[0]), 0.0)
    for number in range(2, 7):
        affinity.told(str(number), state(*others), 0.0)
    ranked = affinity.rank(adapter(*members), 0.0)
    assert set(ranked[:2]) <= {"0", "1"} or ranked[0] in "01"
    assert ranked.index("1") < ranked.index("0") or affinity.rank(adapter(name), 0.0)[0] == "0"


@few
@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.integers())
def test_base_requests_never_prefer_the_most_loaded(loads: list[int], seed: int) -> None:
    affinity = router(map(str, range(len(loads))), seed)
    for number, load in enumerate(loads):
        affinity.told(str(number), state(ongoing=load), 0.0)
    first, second, *_ = affinity.rank(BASE, 0.0)
    assert loads[int(first)] <= loads[int(second)]


def test_ties_are_spread() -> None:
    affinity = router("abcd")
    counts = Counter(affinity.rank(BASE, 0.0)[0] for _ in range(4000))
    assert min(counts[name] for name in "abcd") > 850


def test_base_requests_are_spread_as_they_come() -> None:
    affinity = router("abcd")
    counts = Counter(send(affinity, BASE) for _ in range(400))
    assert max(counts.values()) - min(counts[name] for name in "abcd") <= 6


def test_prompts_that_begin_alike_go_where_they_were_unless_that_is_loaded() -> None:
    affinity = router("abcdefgh")
    firsts = {session: affinity.rank(RouteKey((), session), 0.0)[0] for session in map(str, range(100))}
    assert set(firsts.values()) == set("abcdefgh")
    assert firsts == {session: affinity.rank(RouteKey((), session), 0.0)[0] for session in firsts}
    counts = Counter(send(affinity, RouteKey((), "one for all")) for _ in range(80))
    assert max(counts.values()) <= 12


def test_the_beginning_of_a_prompt_does_not_move_an_adapter() -> None:
    affinity = router("abcdefgh")
    home = send(affinity, adapter("x"))
    affinity.completed(home)
    assert {affinity.rank(adapter("x", session=str(number)), 0.0)[0] for number in range(50)} == {home}


def test_among_the_homes_of_a_hot_adapter_the_beginning_decides() -> None:
    affinity = router("abcd")
    for name in "abcd":
        affinity.told(name, state("x"), 0.0)
    for step in range(200):
        affinity.completed(send(affinity, adapter("x"), step / 100))
    firsts = {session: affinity.rank(adapter("x", session=session), 2.0)[0] for session in map(str, range(100))}
    assert set(firsts.values()) == set("abcd")
    assert firsts == {session: affinity.rank(adapter("x", session=session), 2.0)[0] for session in firsts}


def test_what_was_sent_longest_ago_is_forgotten_first() -> None:
    """So names that nobody has do not fill the memory."""
    affinity = router("ab")
    home, other = affinity.rank(adapter("x"), 0.0)
    for name in ("x", "y"):
        affinity.routed(adapter(name), other, 0.0)
        affinity.completed(other)
    for number in range(4_095):
        affinity.routed(adapter(f"unknown{number}"), other, 0.0)
        affinity.completed(other)
    assert affinity.rank(adapter("y"), 0.0)[0] == other
    assert affinity.rank(adapter("x"), 0.0)[0] == home


def test_what_has_ended_since_it_was_counted_is_not_taken_for_others() -> None:
    """What a replica tells is a second or two old."""
    affinity = router("ab")
    home = affinity.rank(adapter("x"), 0.0)[0]
    for _ in range(20):
        affinity.routed(adapter("x"), home, 0.0)
    for _ in range(20):
        affinity.completed(home)
    affinity.told(home, state("x", ongoing=20), 1.0)
    affinity.told({"a": "b", "b": "a"}[home], state(), 1.0)
    assert affinity.rank(adapter("x"), 1.0)[0] == home
    affinity.told(home, state("x", ongoing=20), 2.0)  # those are others'
    assert affinity.rank(adapter("x"), 2.0)[0] != home


def test_another_release_may_have_a_field_more() -> None:
    """In a rolling release requests go from either to either."""
    key, request = RouteKey(("a",), "s"), Forwarded({"type": "http"}, b"", True, "one")
    for sent in (key, request):
        fields = dict(vars(sent))
        newer = copy.copy(sent)
        vars(newer)["later"] = 1
        assert vars(pickle.loads(pickle.dumps(newer))) == {**fields, "later": 1}
    assert pickle.loads(pickle.dumps(key)) == key
    older = object.__new__(RouteKey)
    vars(older)["adapters"] = ("a",)
    assert pickle.loads(pickle.dumps(older)).session == ""
