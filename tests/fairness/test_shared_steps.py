"""What runs is shared: a flood costs its tenant and its adapter, and a prompt that lacks room costs nobody who fits."""

import pytest

from scheduler_harness import Client, adapter, make, run_all, run_step, submit
from swaplora_server.engine.request import Sequence
from swaplora_server.engine.scheduling import scheduler as scheduler_module
from swaplora_server.engine.scheduling.scheduler import Scheduler

NUM_FLOOD = 40


def steps_until(client: Client, scheduler: Scheduler, most: int = 200) -> int:
    """How many steps are run before it hears of its first token."""
    for number in range(most):
        if client.events:
            return number
        run_step(scheduler)
    raise AssertionError("it waits for ever")


@pytest.mark.parametrize("of", ["tenant", "adapter"])
def test_beside_a_flood_another_begins_as_soon_as_one_ends(of: str) -> None:
    scheduler = make(max_num_seqs=4, max_batch_tokens=64)
    sql, json = (adapter("sql"),), (adapter("json"),)
    flooding, other = ("acme", "beta") if of == "tenant" else ("acme", "acme")
    for number in range(NUM_FLOOD):
        submit(scheduler, [number] * 5, max_tokens=4, tenant=flooding, adapters=sql)
    for _ in range(10):
        run_step(scheduler)
    victim = submit(scheduler, [99] * 5, tenant=other, adapters=sql if of == "tenant" else json)
    assert steps_until(victim, scheduler) <= 5
    run_all(scheduler)


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
    monkeypatch.setattr(scheduler_module, "MAX_STEPS_PASSED_OVER", 5)
    scheduler = make(num_blocks=400, max_num_seqs=4, max_batch_tokens=64)
    sql, json = (adapter("sql"),), (adapter("json"),)
    flooding, other = ("acme", "beta") if of == "tenant" else ("acme", "acme")
    endless = [submit(scheduler, [n] * 5, max_tokens=150, tenant=flooding, adapters=sql) for n in range(6)]
    for _ in range(20):
        run_step(scheduler)
    num_before = scheduler.num_preempted
    victims = [
        submit(scheduler, [90 + n] * 5, max_tokens=150, tenant=other, adapters=sql if of == "tenant" else json)
        for n in range(3)
    ]
    assert steps_until(victims[0], scheduler) <= 7
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
    preempt = scheduler._preempt  # noqa: SLF001

    def noted(sequence: Sequence) -> None:
        taken.append(names[sequence.request])
        preempt(sequence)

    monkeypatch.setattr(scheduler, "_preempt", noted)
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
