"""Those of the last priority beside others: a share of the time, a few rows at a time; alone all that there is."""

from types import SimpleNamespace

import pytest

from scheduler_harness import Client, make, run_step, submit
from swaplora_server.engine.request import LAST_PRIORITY
from swaplora_server.engine.scheduling import scheduler as module
from swaplora_server.engine.scheduling.background import NUM_ROWS, SHARE
from swaplora_server.engine.scheduling.batch import Batch
from swaplora_server.engine.scheduling.scheduler import Scheduler

LIVE_TOKENS, PROMPT, SECONDS, SECONDS_A_ROW = 600, 60, 0.01, 0.001


class Steps:
    """Steps that take the longer the more rows they have, and what of their time was the last priority's."""

    def __init__(self, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
        self._scheduler = scheduler
        self._now = 0.0
        self.of_last: list[int] = []  # rows, of each step
        self.seconds = self.seconds_of_last = 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self._now))

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
