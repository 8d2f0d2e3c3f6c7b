"""Whose place is taken where all are: of those who have most, each now and then, and never for nothing."""

from typing import Any

import pytest

from scheduler_harness import Client, adapter, make, run_all, run_step, submit
from swaplora_server.engine.request import FinishReason, Sequence
from swaplora_server.engine.scheduling import giving_way
from swaplora_server.engine.scheduling.holdings import Holdings
from swaplora_server.engine.scheduling.scheduler import Scheduler


def is_running(client: Client, scheduler: Scheduler) -> bool:
    return any(sequence.request is client.request for sequence in scheduler._running)  # noqa: SLF001


def keep_waiting(scheduler: Scheduler, **fields: Any) -> None:
    """Have a flood of short answers go on."""
    while scheduler.num_waiting < 20:
        submit(scheduler, [99] * 5, **fields)


def test_a_flood_that_has_the_other_places_takes_none_of_who_has_fewer() -> None:
    """Though it has them anew in each step."""
    scheduler = make(num_blocks=400, max_num_seqs=16, max_batch_tokens=128)
    few = [submit(scheduler, [number] * 5, max_tokens=100, tenant="acme") for number in range(6)]
    for _ in range(50):
        keep_waiting(scheduler, max_tokens=1, tenant="beta")
        run_step(scheduler)
    assert scheduler.num_preempted == 0
    assert [len(client.events) for client in few] == [50] * 6
    scheduler.fail_all("", "")


def test_without_a_cache_one_whose_place_is_taken_comes_to_a_token_before_it_is_again() -> None:
    """Its prompt takes longer than others take to come."""
    scheduler = make(num_blocks=400, max_num_seqs=4, max_batch_tokens=16, prefix_cache=False)
    for number in range(3):
        submit(scheduler, [number] * 80, max_tokens=300, tenant="acme")
    for _ in range(20):
        run_step(scheduler)
    victim = submit(scheduler, [9] * 80, max_tokens=5, tenant="acme")
    for step in range(150):
        if step % 4 == 1:
            submit(scheduler, [99] * 2, max_tokens=1, tenant="beta")
        run_step(scheduler)
    assert scheduler.num_preempted > 1
    assert victim.events
    run_all(scheduler)


def test_only_those_of_who_has_most_give_places_up_and_an_adapter_asks_of_its_own_tenant() -> None:
    """A third has as many with its adapter as the first, and less computed."""
    scheduler = make(num_blocks=400, max_num_seqs=8, max_batch_tokens=64)
    own = [submit(scheduler, [n] * 9, max_tokens=90, tenant="acme", adapters=(adapter("sql"),)) for n in range(4)]
    for _ in range(3):
        run_step(scheduler)
    others = [submit(scheduler, [10 + n] * 5, max_tokens=90, tenant="beta") for n in range(4)]
    for _ in range(2):
        run_step(scheduler)
    waiting = submit(scheduler, [90] * 5, max_tokens=30, tenant="acme", adapters=(adapter("legal"),))
    for _ in range(2):
        run_step(scheduler)
    assert waiting.events
    assert [is_running(client, scheduler) for client in others] == [True] * 4
    assert sum(is_running(client, scheduler) for client in own) == 3
    run_all(scheduler)


def test_an_adapter_takes_a_place_of_its_tenant_though_another_tenant_has_more() -> None:
    scheduler = make(num_blocks=400, max_num_seqs=9, max_batch_tokens=64)
    others = [submit(scheduler, [10 + n] * 5, max_tokens=90, tenant="beta") for n in range(5)]
    for n in range(4):
        submit(scheduler, [n] * 5, max_tokens=90, tenant="acme", adapters=(adapter("sql"),))
    for _ in range(3):
        run_step(scheduler)
    waiting = submit(scheduler, [90] * 5, max_tokens=30, tenant="acme", adapters=(adapter("legal"),))
    for _ in range(2):
        run_step(scheduler)
    assert waiting.events
    assert all(is_running(client, scheduler) for client in others)
    run_all(scheduler)


class Slow:
    """A constraint that is busy after each token until it is let go."""

    def __init__(self) -> None:
        self.is_busy = self.is_complete = False

    def forced(self) -> None:
        return None

    def append(self, _token_id: int) -> None:
        self.is_busy = True


@pytest.mark.parametrize("is_found_out_late", [False, True])
def test_one_that_has_all_its_tokens_and_loses_its_place_is_given_no_more(is_found_out_late: bool) -> None:
    """It may not be known yet, when it could begin again, that nothing more comes."""
    scheduler = make(max_num_seqs=2)
    submit(scheduler, [1] * 12, max_tokens=30, tenant="acme")
    constraint: Any = Slow()
    held = submit(scheduler, [2] * 3, max_tokens=1, tenant="acme", constrain=lambda: constraint)
    while not held.events:
        run_step(scheduler)
    submit(scheduler, [3] * 3, max_tokens=1, tenant="beta")
    run_step(scheduler)
    assert scheduler.num_preempted == 1
    constraint.is_busy = is_found_out_late
    run_step(scheduler)
    constraint.is_busy = False
    run_all(scheduler)
    assert [(event.token_id, event.finish_reason) for event in held.events] == [(1, None), (None, FinishReason.LENGTH)]


def test_places_are_counted_once_a_step_however_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are of as many tenants, none of which is behind; and not at all while nobody comes, begins or ends."""
    num_looks = 0

    def look(sequence: Sequence) -> int:
        nonlocal num_looks
        num_looks += 1
        return 1

    monkeypatch.setattr(giving_way, "Holdings", lambda running, _amount: Holdings(running, look))
    scheduler = make(num_blocks=400, max_num_seqs=8, max_batch_tokens=64)
    for number in range(8):
        submit(scheduler, [number] * 5, max_tokens=60, tenant=f"tenant {number}")
    run_step(scheduler)
    for number in range(50):
        submit(scheduler, [number] * 5, max_tokens=1, tenant=f"another {number}")
    for expected in [8, 8, 8]:
        run_step(scheduler)
        assert num_looks == expected
    run_all(scheduler)


def test_the_room_of_one_whose_place_is_taken_goes_to_who_takes_it() -> None:
    scheduler = make(num_blocks=100, max_num_seqs=2, max_batch_tokens=16)
    submit(scheduler, [1] * 30, max_tokens=30, tenant="acme")
    for _ in range(3):
        run_step(scheduler)
    submit(scheduler, [2] * 100, max_tokens=30, tenant="acme")
    run_step(scheduler)
    submit(scheduler, [3] * 40, max_tokens=1, tenant="beta")
    batch = run_step(scheduler)
    assert [(rows.sequence.request.tenant, rows.num_rows) for rows in batch.rows] == [("acme", 1), ("beta", 15)]
    run_all(scheduler)
