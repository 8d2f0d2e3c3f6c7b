"""Where adapters wait for ranks, and ever so many of them do: how many are looked at, and who begins all the same."""

from collections import Counter
from typing import Any

import pytest

from scheduler_harness import Client, adapter, make, run_all, run_step, submit
from swaplora_server.engine.request import Sequence
from swaplora_server.engine.scheduling.kept import MAX_LACKING_RANKS, MAX_LACKING_RANKS_OF_TENANT
from swaplora_server.engine.scheduling.scheduler import Scheduler

MANY = 300
WIDE: dict[str, Any] = {"num_blocks": 4000, "max_num_seqs": 64, "max_batch_tokens": 256, "max_step_ranks": 8}


def crowded(num_tenants: int) -> Scheduler:
    """One adapter runs, and has all ranks; so many other ones wait."""
    scheduler = make(**WIDE)
    submit(scheduler, [1] * 5, max_tokens=500, tenant="tenant 0", adapters=(adapter("runs"),))
    run_step(scheduler)
    for number in range(MANY):
        own = (adapter(f"waits {number}"),)
        submit(scheduler, [2] * 5, max_tokens=1, tenant=f"tenant {number % num_tenants}", adapters=own)
    return scheduler


def beside_lacking(num_tenants: int) -> Scheduler:
    """The same where most places are free."""
    scheduler = make(**WIDE | {"max_step_ranks": 16})
    for number in range(2):
        submit(scheduler, [1] * 5, max_tokens=500, tenant="runs", adapters=(adapter(f"runs {number}"),))
    run_step(scheduler)
    for number in range(4 * MAX_LACKING_RANKS_OF_TENANT):
        own = (adapter(f"waits {number}", rank=16),)
        submit(scheduler, [2] * 5, max_tokens=1, tenant=f"tenant {number % num_tenants}", adapters=own)
    return scheduler


def steps_until_answered(scheduler: Scheduler, client: Client) -> int:
    for step in range(100):
        if client.events:
            return step
        run_step(scheduler)
    raise AssertionError("it has not begun")


@pytest.mark.parametrize("num_tenants", [1, 2, 100])
def test_no_more_are_looked_at_in_a_step_than_a_number_of_each_tenant_and_of_all(
    num_tenants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: Counter[str] = Counter()
    look = Scheduler._has_ranks  # noqa: SLF001

    def counted(scheduler: Scheduler, sequence: Sequence) -> bool:
        looked_at[sequence.request.tenant] += 1
        return look(scheduler, sequence)

    scheduler = crowded(num_tenants)
    monkeypatch.setattr(Scheduler, "_has_ranks", counted)
    for _ in range(10):
        looked_at.clear()
        run_step(scheduler)
        assert looked_at.total() == min(MAX_LACKING_RANKS, num_tenants * MAX_LACKING_RANKS_OF_TENANT)
        assert max(looked_at.values()) <= MAX_LACKING_RANKS_OF_TENANT
    scheduler.fail_all("", "")


def test_one_whose_adapter_runs_joins_it_however_many_lack_ranks_before_it() -> None:
    """Its line was served far more than theirs."""
    for num_tenants in (1, 100):
        scheduler = crowded(num_tenants)
        joins = submit(scheduler, [3] * 5, max_tokens=1, tenant="tenant 0", adapters=(adapter("runs"),))
        assert steps_until_answered(scheduler, joins) <= 2
        scheduler.fail_all("", "")


def test_many_adapters_of_one_tenant_hold_up_nobody_of_another_who_lacks_no_ranks() -> None:
    """Though the other was served more."""
    scheduler = make(**WIDE)
    submit(scheduler, [1] * 99, max_tokens=500, tenant="beta", adapters=(adapter("runs"),))
    run_step(scheduler)
    for number in range(MANY):
        submit(scheduler, [2] * 5, max_tokens=1, tenant="acme", adapters=(adapter(f"waits {number}"),))
    other = submit(scheduler, [3] * 5, max_tokens=1, tenant="beta")
    assert steps_until_answered(scheduler, other) <= 2
    scheduler.fail_all("", "")


@pytest.mark.parametrize("tenant", ["tenant 0", "other"])
@pytest.mark.parametrize("num_tenants", [1, 4])
@pytest.mark.parametrize("needed", [(), ("runs 0",), ("runs 1", "runs 0")])
def test_one_that_needs_no_more_ranks_than_run_begins_at_once(
    needed: tuple[str, ...], num_tenants: int, tenant: str
) -> None:
    """The base, and adapters that run for another tenant, one or a sum of them."""
    scheduler = beside_lacking(num_tenants)
    client = submit(scheduler, [3] * 5, max_tokens=1, tenant=tenant, adapters=tuple(map(adapter, needed)))
    assert steps_until_answered(scheduler, client) <= 2
    lacking = submit(scheduler, [3] * 5, max_tokens=1, tenant=tenant, adapters=(adapter("runs 0"), adapter("more")))
    run_step(scheduler)
    assert not lacking.events
    scheduler.fail_all("", "")


@pytest.mark.parametrize("num_tenants", [1, 7])
def test_everybody_is_answered(num_tenants: int) -> None:
    scheduler = crowded(num_tenants)
    late = submit(scheduler, [4] * 5, max_tokens=1, tenant="tenant 0", adapters=(adapter("late", rank=16),))
    run_all(scheduler)
    assert late.events
