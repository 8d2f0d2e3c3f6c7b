"""What runs is shared: a flood costs its tenant and its adapter, and a prompt that lacks room costs nobody who fits."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_harness import Client, adapter, make, run_all, run_step, submit
from swaplora_server.engine.request import Sequence
from swaplora_server.engine.scheduling import scheduler as scheduler_module
from swaplora_server.engine.scheduling.giving_way import STEPS_BETWEEN
from swaplora_server.engine.scheduling.scheduler import Scheduler

NUM_FLOOD = 40


def flooding() -> dict[str, Any]:
    """Whose a flood is."""
    return {"tenant": "acme", "adapters": (adapter("sql"),)}


def beside(of: str, name: str = "beta") -> dict[str, Any]:
    """Whose another is: of a tenant of its own, or of the flood's with an adapter of its own."""
    return flooding() | ({"tenant": name} if of == "tenant" else {"adapters": (adapter(name),)})


def steps_until(client: Client, scheduler: Scheduler, most: int = 200) -> int:
    """How many steps are run before it hears of its first token."""
    for number in range(most):
        if client.events:
            return number
        run_step(scheduler)
    raise AssertionError("it waits for ever")


@pytest.mark.parametrize("of", ["tenant", "adapter"])
@pytest.mark.parametrize("max_tokens", [4, 150])
def test_beside_a_flood_that_has_all_places_another_begins_at_once(of: str, max_tokens: int) -> None:
    """Whatever its answers' length, and though all of them began together and none is about to end."""
    scheduler = make(num_blocks=400, max_num_seqs=4, max_batch_tokens=64)
    flood = [submit(scheduler, [number] * 5, max_tokens=max_tokens, **flooding()) for number in range(NUM_FLOOD)]
    for number in range(5):
        for _ in range(STEPS_BETWEEN):
            run_step(scheduler)
        victim = submit(scheduler, [90 + number] * 5, max_tokens=1, **beside(of))
        assert steps_until(victim, scheduler) <= 2
    assert scheduler.num_preempted <= 5
    run_all(scheduler)
    assert all(len(client.events) == max_tokens for client in flood)


def test_who_gives_its_place_up_computes_no_more_than_a_block_again() -> None:
    num_rows = []
    for has_other in (False, True):
        scheduler = make(num_blocks=400, block_size=4, max_num_seqs=4, max_batch_tokens=64)
        for number in range(4):
            submit(scheduler, [number] * 21, max_tokens=30, tenant="acme")
        num_rows.append(sum(rows.num_rows for _ in range(10) for rows in run_step(scheduler).rows))
        if has_other:
            other = submit(scheduler, [99] * 5, max_tokens=1, tenant="beta")
            num_rows[-1] += sum(rows.num_rows for rows in run_step(scheduler).rows) - 5
            assert other.has_ended
        num_rows[-1] += run_all(scheduler)
        assert scheduler.num_preempted == has_other
    assert 0 < num_rows[1] - num_rows[0] <= 4


def test_of_those_that_have_most_the_one_gives_its_place_up_of_which_least_is_computed() -> None:
    scheduler = make(num_blocks=400, max_num_seqs=3, max_batch_tokens=64)
    first = [submit(scheduler, [number] * 5, max_tokens=50, tenant="acme") for number in range(2)]
    for _ in range(10):
        run_step(scheduler)
    last = submit(scheduler, [3] * 5, max_tokens=50, tenant="acme")
    run_step(scheduler)
    submit(scheduler, [99] * 5, max_tokens=5, tenant="beta")
    before = [len(client.events) for client in (*first, last)]
    for _ in range(3):
        run_step(scheduler)
    assert [len(client.events) - count for client, count in zip((*first, last), before, strict=True)] == [3, 3, 0]
    run_all(scheduler)


@pytest.mark.parametrize("of", ["tenant", "adapter"])
def test_those_who_have_alike_take_no_places_from_each_other(of: str) -> None:
    """One who has none waits where nobody has two, and of two floods none takes a place that it would lose again."""
    scheduler = make(num_blocks=400, max_num_seqs=4, max_batch_tokens=64)
    for number in range(4):
        submit(scheduler, [number] * 5, max_tokens=40, **beside(of, f"other {number}"))
    run_step(scheduler)
    waiting = submit(scheduler, [99] * 5, max_tokens=1, **flooding())
    for _ in range(30):
        run_step(scheduler)
    assert not waiting.events
    assert not scheduler.num_preempted
    run_all(scheduler)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=2, max_size=4),
    st.integers(2, 8),
    st.sampled_from(["tenant", "adapter"]),
)
def test_floods_take_places_from_each_other_now_and_then_alone_and_each_has_some_soon(
    sizes: list[tuple[int, int]], num_places: int, of: str
) -> None:
    """The first has all places when the others come."""
    scheduler = make(num_blocks=600, max_num_seqs=num_places, max_batch_tokens=64)
    clients: list[list[Client]] = [[] for _ in sizes]
    for step in range(60):
        for number, (prompt, max_tokens) in enumerate(sizes):
            while (not number or step > 5) and sum(not client.has_ended for client in clients[number]) <= num_places:
                ids = [number, len(clients[number]), *range(prompt)]
                clients[number].append(submit(scheduler, ids, max_tokens=max_tokens, **beside(of, str(number))))
        run_step(scheduler)
        if step == 6 + STEPS_BETWEEN * len(sizes) and len(sizes) * 2 <= num_places:
            assert all(any(client.events for client in own) for own in clients)
    assert scheduler.num_preempted <= 60 / STEPS_BETWEEN
    scheduler.fail_all("", "")


def test_two_tenants_who_flood_are_served_alike_however_large_their_requests() -> None:
    scheduler = make(num_blocks=200, max_num_seqs=6, max_batch_tokens=64)
    clients = {"acme": [], "beta": []}  # type: dict[str, list[Client]]
    for number in range(NUM_FLOOD):
        clients["acme"].append(submit(scheduler, [number] * 3, max_tokens=20, tenant="acme"))
        clients["beta"] += [submit(scheduler, [100 + number] * 3, max_tokens=2, tenant="beta") for _ in range(8)]
    for _ in range(100):
        run_step(scheduler)
    generated = {tenant: sum(len(client.events) for client in own) for tenant, own in clients.items()}
    begun = {tenant: sum(bool(client.events) for client in own) for tenant, own in clients.items()}
    assert begun["beta"] > 4 * begun["acme"]
    served = {tenant: 3 * begun[tenant] + 2 * generated[tenant] for tenant in clients}
    assert abs(served["acme"] - served["beta"]) <= 6 * (3 + 2 * 20)
    run_all(scheduler)


def test_the_lower_priority_of_a_tenant_goes_first() -> None:
    scheduler = make(max_num_seqs=1)
    submit(scheduler, [0])
    late, early = submit(scheduler, [1], priority=5, adapters=(adapter("sql"),)), submit(scheduler, [2], priority=-5)
    steps_until(early, scheduler)
    assert not late.events
    run_all(scheduler)


def test_short_prompts_pass_one_that_lacks_blocks_which_begins_when_what_ran_before_it_has_ended() -> None:
    """However many more of them come."""
    scheduler = make(num_blocks=20, block_size=4, max_batch_tokens=100)
    before = submit(scheduler, [0] * 40, max_tokens=8)
    run_step(scheduler)
    long = submit(scheduler, [1] * 44, max_tokens=4)
    waits: list[int] = []
    while not before.has_ended:
        waits.append(steps_until(submit(scheduler, [2 + len(waits)] * 3, max_tokens=2), scheduler))
    assert waits == [1] * len(waits)
    assert not long.events
    for _ in range(4):
        submit(scheduler, [99] * 3, max_tokens=2)
        run_step(scheduler)
    assert long.events
    run_all(scheduler)


def test_what_would_not_fit_beside_one_that_lacks_blocks_does_not_pass_it() -> None:
    """Else it could be passed for ever."""
    scheduler = make(num_blocks=20, block_size=4, max_batch_tokens=100)
    submit(scheduler, [0] * 40, max_tokens=8)
    run_step(scheduler)
    long = submit(scheduler, [1] * 44, max_tokens=4)
    num_passed = 0
    for number in range(100):
        other = submit(scheduler, [2 + number] * 8, max_tokens=40)
        run_step(scheduler)
        if long.events:
            break
        num_passed += bool(other.events)
    assert long.events
    assert num_passed == 0
    run_all(scheduler)


def test_a_long_prompt_leaves_half_of_each_step_to_who_waits_and_has_all_that_nobody_takes() -> None:
    scheduler = make(num_blocks=200, max_batch_tokens=16)
    long = submit(scheduler, range(120), max_tokens=1)
    assert [rows.num_rows for rows in run_step(scheduler).rows] == [16]
    short = submit(scheduler, [9] * 8, max_tokens=1)
    assert sorted(rows.num_rows for rows in run_step(scheduler).rows) == [8, 8]
    assert short.events
    assert [rows.num_rows for rows in run_step(scheduler).rows] == [16]
    submit(scheduler, [8] * 3, max_tokens=1)
    assert sorted(rows.num_rows for rows in run_step(scheduler).rows) == [3, 13]
    assert not long.events
    run_all(scheduler)


@pytest.mark.parametrize("of", ["tenant", "adapter"])
def test_endless_answers_that_have_all_places_give_a_share_of_them_up(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One place at once, for who has none; the next in a while, for who would still have no more than half of it."""
    monkeypatch.setattr(scheduler_module, "MAX_STEPS_PASSED_OVER", 5)
    scheduler = make(num_blocks=400, max_num_seqs=4, max_batch_tokens=64)
    endless = [submit(scheduler, [n] * 5, max_tokens=150, **flooding()) for n in range(6)]
    for _ in range(20):
        run_step(scheduler)
    num_before = scheduler.num_preempted
    victims = [submit(scheduler, [90 + n] * 5, max_tokens=150, **beside(of)) for n in range(3)]
    for _ in range(2):
        run_step(scheduler)
    assert [bool(client.events) for client in victims] == [True, False, False]
    for _ in range(30):
        run_step(scheduler)
    assert [bool(client.events) for client in victims] == [True, True, False], "half of four"
    assert (num_before, scheduler.num_preempted) == (0, 2), "nobody gives up a place to its own like"
    assert [bool(client.events) for client in endless] == [True] * 4 + [False] * 2
    run_all(scheduler)
    assert all(len(client.events) == 150 for client in endless + victims)


def preempted(shares: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, first_prompt: int = 4) -> list[str]:
    """Whose blocks were taken, in order, where so many sequences of each tenant need a third of all blocks at last.

    They come in this order; each is named by its tenant and its number.
    """
    scheduler = make(num_blocks=24, block_size=2, max_num_seqs=20, max_batch_tokens=64, prefix_cache=False)
    names = {
        submit(
            scheduler, [10 * row + index] * (4 if row or index else first_prompt), max_tokens=12, tenant=tenant
        ).request: f"{tenant} {index}"
        for row, (tenant, count) in enumerate(shares)
        for index in range(count)
    }
    taken: list[str] = []
    preempt = scheduler._live.preempt  # noqa: SLF001

    def noted(sequence: Sequence) -> None:
        taken.append(names[sequence.request])
        preempt(sequence)

    monkeypatch.setattr(scheduler._live, "preempt", noted)  # noqa: SLF001
    run_all(scheduler)
    return taken


def test_who_holds_most_blocks_gives_them_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tenant with one came last, and is the youngest of all."""
    taken = preempted([("acme", 4), ("beta", 1)], monkeypatch)
    assert taken
    assert "beta 0" not in taken


def test_the_oldest_goes_on_whatever_its_tenant_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = preempted([("acme", 1), ("beta", 2)], monkeypatch, first_prompt=24)
    assert taken
    assert "acme 0" not in taken
