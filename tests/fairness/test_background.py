"""Those of the last priority beside others: a share of the time, a few rows at a time; alone all that there is."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler_harness import Client, adapter, make, run_all, run_step, submit
from swaplora_adapters.registry.leases import RequestLeases
from swaplora_adapters.registry.residency.claims import Claim, Resident
from swaplora_server.engine.engine import Engine
from swaplora_server.engine.request import LAST_PRIORITY
from swaplora_server.engine.scheduling import scheduler as module
from swaplora_server.engine.scheduling.background import NUM_ROWS, SHARE
from swaplora_server.engine.scheduling.batch import Batch
from swaplora_server.engine.scheduling.scheduler import Scheduler
from swaplora_server.service.adapter_mix import AdapterMix, awaited_uses
from swaplora_server.service.admission import Urgency

NO_RUNNER: Any = None
LIVE_TOKENS, PROMPT, SECONDS, SECONDS_A_ROW = 600, 60, 0.01, 0.001


class Steps:
    """Steps that take the longer the more rows they have, and what of their time was the last priority's."""

    def __init__(self, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
        self._scheduler = scheduler
        self._now = 0.0
        self.of_last: list[int] = []  # rows, of each step
        self.seconds = self.seconds_of_last = 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self._now))

    def idle(self, seconds: float) -> None:
        self._now += seconds

    def run(self) -> Batch:
        batch = run_step(self._scheduler)
        whole = sum(rows.num_rows for rows in batch.rows)
        self.of_last.append(sum(rows.num_rows for rows in batch.rows if rows.sequence.priority == LAST_PRIORITY))
        taken = SECONDS + SECONDS_A_ROW * whole
        self._now += taken
        self.seconds += taken
        self.seconds_of_last += taken * self.of_last[-1] / max(1, whole)
        return batch


def evaluate(scheduler: Scheduler, number: int) -> Client:
    return submit(scheduler, [number] * PROMPT, 6, priority=LAST_PRIORITY, tenant="other")


@pytest.mark.parametrize("num_live", [1, 5])
def test_beside_others_they_have_a_share_of_the_time(num_live: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(num_blocks=2000, max_batch_tokens=256)
    steps = Steps(scheduler, monkeypatch)
    live = [submit(scheduler, [50 + number] * 5, LIVE_TOKENS) for number in range(num_live)]
    steps.run()
    asked = [evaluate(scheduler, number) for number in range(20)]
    num_tokens = len(live[0].events)
    while not live[0].has_ended:
        steps.run()
        num_tokens += 1
        assert all(len(client.events) == num_tokens for client in live)  # a token in every step
    assert max(steps.of_last) == NUM_ROWS
    most = SHARE * steps.seconds
    assert 0.5 * most < steps.seconds_of_last <= most + SECONDS + SECONDS_A_ROW * (NUM_ROWS + num_live)
    assert any(client.has_ended for client in asked)
    assert not asked[-1].has_ended


def test_alone_they_have_all_of_a_step_and_owe_nothing_when_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(num_blocks=2000, max_batch_tokens=256)
    steps = Steps(scheduler, monkeypatch)
    for number in range(3):
        evaluate(scheduler, number)
    steps.run()
    client = submit(scheduler, [50] * 5, 40)
    for _ in range(30):
        steps.run()
    assert len(client.events) == 30
    assert steps.of_last[:2] == [3 * PROMPT, 3]  # when it came they were in the step already
    assert any(steps.of_last[2:])  # but of the time before they owe it nothing


@pytest.mark.parametrize("scarce", ["ranks", "blocks", "places"])
@pytest.mark.parametrize("is_oldest", [True, False])
def test_they_give_way_at_once_to_one_that_lacks_what_they_hold(
    scarce: str, is_oldest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it has more than they, and they have come to no token since they gave way before."""
    limits: dict[str, dict[str, Any]] = {
        "ranks": {"max_step_ranks": 8},
        "blocks": {"num_blocks": 48},
        "places": {"max_num_seqs": 2},
    }
    scheduler = make(**{"num_blocks": 400, "max_batch_tokens": 256} | limits[scarce])
    steps = Steps(scheduler, monkeypatch)
    evaluation: dict[str, Any] = {"priority": LAST_PRIORITY, "tenant": "eval", "adapters": (adapter("e"),)}
    with scheduler.background.hurried_while(lambda: True):
        asked = [submit(scheduler, [9] * 100, 30, **evaluation)] if is_oldest else []
        steps.run()
        submit(scheduler, [50] * 5, 60, tenant="live")
        steps.run()
        asked = asked or [submit(scheduler, [9] * 100, 30, **evaluation)]
        steps.run()
    for number in range(3):
        steps.run()
        client = submit(scheduler, [number] * 70, 2, tenant="live", adapters=(adapter(f"own {number}"),))
        begun = steps_until(client, steps)
        assert begun <= 3, number
        while not client.has_ended:
            steps.run()
    assert scheduler.num_preempted > 0
    run_all(scheduler)
    assert all(client.has_ended for client in asked)


def steps_until(client: Client, steps: Steps) -> int:
    """Until it has a token."""
    for number in range(100):
        if client.events:
            return number
        steps.run()
    raise AssertionError("it has not begun")


@pytest.mark.parametrize(
    ("limit", "prompt", "evaluated"),
    [({"max_step_ranks": 8}, 5, {"adapters": (adapter("e", rank=8),)}), ({"num_blocks": 100}, 320, {})],
)
def test_what_one_of_them_lacks_is_not_kept_from_others(
    limit: dict[str, Any], prompt: int, evaluated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it waits; it begins when there is room."""
    scheduler = make(**{"num_blocks": 400, "max_batch_tokens": 512} | limit)
    steps = Steps(scheduler, monkeypatch)
    submit(scheduler, [50] * 150, 140, tenant="live", adapters=(adapter("own", rank=4),))
    steps.run()
    asked = submit(scheduler, [9] * prompt, 2, priority=LAST_PRIORITY, tenant="eval", **evaluated)
    for number in range(90):
        steps.run()
        if number % 5 == 4:
            client = submit(scheduler, [number] * 80, 4, tenant="another", adapters=(adapter("other", rank=4),))
            assert steps_until(client, steps) == 1, number
    assert not asked.events
    run_all(scheduler)
    assert asked.has_ended


def test_nobody_waits_for_a_block_that_they_compute_but_others_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(num_blocks=2000, max_batch_tokens=256)
    steps = Steps(scheduler, monkeypatch)
    submit(scheduler, [50] * 5, LIVE_TOKENS)
    steps.run()
    prompt = list(range(100, 200))
    for _ in range(2):
        submit(scheduler, prompt, 6, priority=LAST_PRIORITY)
    steps.run()
    assert scheduler.num_waiting == 1  # for the first
    client = submit(scheduler, [*prompt[:90], 7], 4)
    assert steps_until(client, steps) == 1
    scheduler.fail_all("", "")


def test_time_in_which_no_step_was_is_not_owed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody was there in it."""
    scheduler = make(num_blocks=2000, max_batch_tokens=256)
    steps = Steps(scheduler, monkeypatch)
    client = submit(scheduler, [50] * 5, 2)
    steps.run()
    evaluate(scheduler, 1)
    steps.run()
    assert client.has_ended
    assert steps.of_last[-1] == NUM_ROWS
    scheduler.abort(next(iter(scheduler._live)).request)  # noqa: SLF001
    steps.idle(3600)
    submit(scheduler, [51] * 5, LIVE_TOKENS)
    steps.run()
    evaluate(scheduler, 2)
    steps.run()
    assert steps.of_last[-1] == NUM_ROWS


def test_while_another_waits_for_memory_they_have_all_of_a_step_and_owe_nothing_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make(num_blocks=2000, max_batch_tokens=256)
    steps = Steps(scheduler, monkeypatch)
    submit(scheduler, [50] * 5, LIVE_TOKENS)
    steps.run()
    is_short = False
    with scheduler.background.hurried_while(lambda: is_short):
        first = evaluate(scheduler, 1)
        steps.run()
        assert steps.of_last[-1] == NUM_ROWS
        is_short = True
        assert steps_until(first, steps) == 1
        while not first.has_ended:
            steps.run()
        second = evaluate(scheduler, 2)
        steps.run()
        assert second.events
    evaluate(scheduler, 3)
    for _ in range(100):
        steps.run()
    assert 0 < max(steps.of_last[-100:]) <= NUM_ROWS
    scheduler.fail_all("", "")


@pytest.mark.parametrize("priority", [0, LAST_PRIORITY])
async def test_a_request_of_others_hurries_them_as_long_as_it_lacks_room(priority: int) -> None:
    """And not while its weights are loaded."""
    scheduler = make()
    service: Any = SimpleNamespace(engine=Engine(scheduler, NO_RUNNER))
    submit(scheduler)
    running, most = tuple(scheduler._live), 1000  # noqa: SLF001
    claim = Claim({"digest": 10}, 0.0)
    mix = AdapterMix(RequestLeases([], claim, lambda _claim: None), (), ())
    waits = asyncio.create_task(awaited_uses(service, mix, Urgency(priority)))
    await asyncio.sleep(0)
    assert scheduler.background.num_rows(1.0, running, most) == (NUM_ROWS if priority == LAST_PRIORITY else most)
    claim.residents = (Resident("digest", 10),)
    assert scheduler.background.num_rows(2.0, running, most) == NUM_ROWS
    claim.residents = ()
    claim.weights.set_result({})
    assert await waits == ()
    assert scheduler.background.num_rows(3.0, running, most) == NUM_ROWS
    scheduler.fail_all("", "")
