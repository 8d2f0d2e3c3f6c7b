"""Who gives way: all that it takes for another to begin at once, or nobody; and for blocks and ranks as for places."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_harness import Client, adapter, make, run_all, run_step, said_of, submit
from swaplora_server.engine.request import LAST_PRIORITY, Sequence
from swaplora_server.engine.scheduling import scheduler as scheduler_module
from swaplora_server.engine.scheduling.giving_way import SHARE_COMPUTED_AGAIN, STEPS_BETWEEN
from swaplora_server.engine.scheduling.kept import MAX_LACKING, MAX_LACKING_OF_LINE, Kept
from swaplora_server.engine.scheduling.scheduler import MAX_STEPS_PASSED_OVER, Scheduler


@dataclass
class Watched:
    """A scheduler, for whom somebody gave way in each of its steps, and how many rows were computed."""

    scheduler: Scheduler
    given: list[tuple[Sequence, list[Sequence]]] = field(default_factory=list)
    num_steps: int = 0
    num_rows: int = 0

    def __post_init__(self) -> None:
        way = self.scheduler._giving_way  # noqa: SLF001
        givers = way.givers

        def noted(waiting: Sequence, found: Collection[int], times: int, before: int) -> list[Sequence]:
            gave = givers(waiting, found, times, before)
            self.given += [(waiting, gave)] if gave else []
            return gave

        way.givers = noted  # type: ignore[method-assign]

    def step(self) -> None:
        before, has_work = len(self.given), self.scheduler.has_work
        batch = self.scheduler.schedule()
        assert batch.rows or not has_work, "somebody waits, and nobody runs"
        self.scheduler.commit(batch, [said_of(rows, 1) for rows in batch.asking])
        self.scheduler.check_integrity()
        self.num_rows += sum(rows.num_rows for rows in batch.rows)
        self.num_steps += 1
        for waiting, gave in self.given[before:]:
            assert waiting.begun_in == self.num_steps, "they gave way in vain"
            assert all((giver.begun_in or 0) < self.num_steps for giver in gave), "they gave way and went on at once"


def has_begun(client: Client) -> bool:
    return client.request.begun_at is not None


def test_an_adapter_that_does_not_fit_begins_in_a_while_and_until_then_everybody_goes_on() -> None:
    """They run endlessly with an adapter that has all ranks, and all of them give way at once."""
    scheduler = make(num_blocks=900, max_num_seqs=8, max_batch_tokens=64, max_step_ranks=16)
    flood = [submit(scheduler, [n] * 5, 300, tenant="acme", adapters=(adapter("sql", rank=16),)) for n in range(20)]
    run_step(scheduler)
    waiting = submit(scheduler, [99] * 5, 1, tenant="beta", adapters=(adapter("legal"),))
    num_steps = 0
    while not waiting.events:
        assert scheduler.num_running == 8
        run_step(scheduler)
        num_steps += 1
    assert MAX_STEPS_PASSED_OVER <= num_steps <= 2 * MAX_STEPS_PASSED_OVER + 2
    assert scheduler.num_preempted == 8
    run_all(scheduler)
    assert all(len(client.events) == 300 for client in flood)


def test_those_pass_one_that_waits_for_ranks_that_do_not_hold_it_up() -> None:
    """When it has waited for long: rows of the base, and an adapter that fits beside it; no more of who has all."""
    scheduler = make(num_blocks=900, max_num_seqs=16, max_batch_tokens=64, max_step_ranks=16)
    running = submit(scheduler, [1] * 5, 300, adapters=(adapter("sql", rank=12),))
    run_step(scheduler)
    waiting = submit(scheduler, [2] * 5, 1, adapters=(adapter("legal", rank=12),))
    for _ in range(MAX_STEPS_PASSED_OVER + 1):
        run_step(scheduler)
    of_base = submit(scheduler, [3] * 5, 1)
    beside = submit(scheduler, [4] * 5, 1, adapters=(adapter("small", rank=4),))
    more = submit(scheduler, [5] * 5, 1, adapters=(adapter("sql", rank=12),))
    run_step(scheduler)
    assert [has_begun(client) for client in (waiting, of_base, beside, more)] == [False, True, True, False]
    scheduler.abort(running.request)
    run_step(scheduler)
    assert has_begun(waiting)
    run_all(scheduler)


def test_adapters_that_exclude_each_other_take_turns_of_many_steps_and_all_of_one_run_together() -> None:
    scheduler = make(num_blocks=2000, max_num_seqs=8, max_batch_tokens=64, max_step_ranks=8)
    names = ("sql", "legal", "json")
    for name in names:
        for number in range(8):
            submit(scheduler, [number] * 5, 400, adapters=(adapter(name),))
    turns: list[str] = []
    for _ in range(6 * MAX_STEPS_PASSED_OVER):
        [name] = {rows.sequence.request.digests[0] for rows in run_step(scheduler).rows}
        turns += [] if turns[-1:] == [name] else [name]
        assert scheduler.num_running == 8
    assert set(turns) == set(names)
    assert len(turns) <= 6
    scheduler.fail_all("", "")


@pytest.mark.parametrize("of", ["tenant", "adapter"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_one_far_behind_gets_blocks_of_a_flood_that_has_them_all(of: str, prefix_cache: bool) -> None:
    """There are places for three times as many. The oldest keeps its blocks, and all come to their ends."""
    scheduler = make(num_blocks=60, block_size=4, max_num_seqs=30, max_batch_tokens=64, prefix_cache=prefix_cache)
    watched = Watched(scheduler)
    flooding: dict[str, Any] = {"tenant": "acme", "adapters": (adapter("sql"),)}
    flood = [submit(scheduler, [n] * 12, 60, **flooding) for n in range(15)]
    for _ in range(12):
        watched.step()
    assert scheduler.num_running < 15
    waits = []
    for number in range(6):
        other = {"tenant": "beta"} if of == "tenant" else {"adapters": (adapter("legal"),)}
        victim = submit(scheduler, [90 + number] * 14, 2, **(flooding | other))
        began = watched.num_steps
        while not victim.events:
            watched.step()
        waits.append(watched.num_steps - began)
        for _ in range(8):
            watched.step()
    assert max(waits) <= 8
    assert all(giver.request is not flood[0].request for _, gave in watched.given for giver in gave)
    run_all(scheduler)
    assert all(len(client.events) == 60 for client in flood)


def test_one_that_would_have_as_many_blocks_as_who_has_most_waits_for_them() -> None:
    scheduler = make(num_blocks=40, block_size=4, max_num_seqs=30, max_batch_tokens=200)
    watched = Watched(scheduler)
    for number in range(3):
        submit(scheduler, [number] * 40, 8, tenant="acme")
    watched.step()
    long = submit(scheduler, [9] * 80, 2, tenant="beta")
    while not has_begun(long):
        watched.step()
    assert not watched.given
    run_all(scheduler)


def test_no_more_give_way_than_it_takes() -> None:
    """The one of which least is computed goes on where another's blocks are enough."""
    scheduler = make(num_blocks=49, block_size=4, max_num_seqs=30, max_batch_tokens=200, prefix_cache=False)
    watched = Watched(scheduler)
    for number, length in enumerate((60, 60, 40, 4)):
        submit(scheduler, [number] * length, 3 * length, tenant="acme")
        watched.step()
    submit(scheduler, [9] * 30, 2, tenant="beta")
    watched.step()
    [(_, [giver])] = watched.given
    assert giver.token_ids[0] == 2
    run_all(scheduler)


def test_of_what_steps_have_room_for_a_quarter_is_computed_again_at_most() -> None:
    """Without a cache all of a prompt is, however often somebody comes who is far behind."""
    scheduler = make(num_blocks=900, max_num_seqs=6, max_batch_tokens=32, prefix_cache=False)
    watched = Watched(scheduler)
    for number in range(6):
        submit(scheduler, [number] * 150, 500, tenant="acme")
    for _ in range(40):
        watched.step()
    for number in range(300):
        if not scheduler.num_waiting:
            submit(scheduler, [number] * 2, 1, tenant="beta")
        watched.step()
    num_again = sum(150 for _, gave in watched.given for _ in gave)
    assert 0 < num_again <= (300 + 20) * 32 / SHARE_COMPUTED_AGAIN
    scheduler.fail_all("", "")


asked = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from(("acme", "beta", "gamma")),
        "adapters": st.sampled_from(
            ((), *((adapter(name, rank=rank),) for name, rank in (("a", 8), ("b", 4), ("c", 12))))
        ),
        "max_tokens": st.integers(1, 30),
        "length": st.integers(1, 40),
    }
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), asked), min_size=1, max_size=40),
    st.fixed_dictionaries(
        {
            "num_blocks": st.integers(20, 60),
            "max_num_seqs": st.integers(1, 8),
            "max_batch_tokens": st.integers(8, 64),
            "max_step_ranks": st.sampled_from((8, 12, 4096)),
            "prefix_cache": st.booleans(),
        }
    ),
)
def test_nobody_gives_way_in_vain_everybody_ends_and_what_is_computed_again_is_bounded(
    coming: list[tuple[int, dict[str, Any]]], limits: dict[str, Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "MAX_STEPS_PASSED_OVER", 5)
        watched = Watched(make(**limits))
        clients: list[Client] = []
        for number, (num_steps, fields) in enumerate(coming):
            length, max_tokens = fields["length"], fields["max_tokens"]
            clients.append(
                submit(
                    watched.scheduler,
                    [number % 7, *range(length - 1)],
                    max_tokens,
                    tenant=fields["tenant"],
                    adapters=fields["adapters"],
                )
            )
            for _ in range(num_steps):
                watched.step()
        num_needed = sum(fields["length"] + fields["max_tokens"] for _, fields in coming)
        while watched.scheduler.has_work:
            watched.step()
            assert watched.num_steps < 20 * num_needed, "somebody waits for ever"
    assert [len(client.events) for client in clients] == [fields["max_tokens"] for _, fields in coming]
    assert len(watched.given) <= watched.num_steps / STEPS_BETWEEN + 1
    if watched.scheduler.num_preempted == sum(len(gave) for _, gave in watched.given):
        most_again = (watched.num_steps + 40) * limits["max_batch_tokens"] / SHARE_COMPUTED_AGAIN
        assert watched.num_rows - num_needed <= most_again


@pytest.mark.parametrize("lacking", ["places", "blocks"])
@pytest.mark.parametrize(
    ("running", "waiting", "of", "gives_way"),
    [
        (-100, 100, "adapter", False),
        (0, LAST_PRIORITY, "adapter", False),
        (100, -100, "adapter", True),
        (LAST_PRIORITY, LAST_PRIORITY, "adapter", True),
        (-100, 100, "tenant", True),
        (0, LAST_PRIORITY, "tenant", False),
    ],
)
def test_nobody_gives_way_to_a_later_priority_of_its_tenant_nor_to_the_last_of_any(
    lacking: str, running: int, waiting: int, of: str, gives_way: bool
) -> None:
    """Between tenants no other priority counts."""
    num_blocks, max_num_seqs = (900, 8) if lacking == "places" else (40, 30)
    scheduler = make(num_blocks=num_blocks, block_size=4, max_num_seqs=max_num_seqs, max_batch_tokens=64)
    watched = Watched(scheduler)
    flooding: dict[str, Any] = {"tenant": "acme", "adapters": (adapter("sql"),)}
    for number in range(12):
        submit(scheduler, [number] * 12, 60, priority=running, **flooding)
    for _ in range(6):
        watched.step()
    assert scheduler.num_waiting
    other: dict[str, Any] = {"tenant": "beta"} if of == "tenant" else {"adapters": (adapter("legal"),)}
    client = submit(scheduler, [99] * 14, 4, priority=waiting, **(flooding | other))
    for _ in range(12):
        watched.step()
    assert has_begun(client) == gives_way
    assert any(waiting.request is client.request for waiting, _ in watched.given) == gives_way
    scheduler.fail_all("", "")


@pytest.mark.parametrize("num_adapters", [1, 5, 400])
def test_however_many_lack_blocks_no_more_than_some_are_looked_at_in_a_step(
    num_adapters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short one of another adapter passes them all the same, where one adapter floods."""
    scheduler = make(num_blocks=60, block_size=4, max_num_seqs=30, max_batch_tokens=400, prefix_cache=False)
    submit(scheduler, [1] * 200, 60)
    run_step(scheduler)
    looks: list[Sequence] = []
    leaves_blocks = Kept.leaves_blocks

    def counting(kept: Kept, sequence: Sequence) -> bool:
        looks.append(sequence)
        return leaves_blocks(kept, sequence)

    monkeypatch.setattr(Kept, "leaves_blocks", counting)
    for number in range(400):
        submit(scheduler, [2] * 100, 8, adapters=(adapter(f"a{number % num_adapters}"),))
    short = submit(scheduler, [3] * 3, 1, adapters=(adapter("short"),))
    for _ in range(4):
        looks.clear()
        run_step(scheduler)
        assert 0 < len(looks) <= MAX_LACKING + 1
    assert has_begun(short) == (num_adapters < MAX_LACKING // MAX_LACKING_OF_LINE)
    scheduler.fail_all("", "")
