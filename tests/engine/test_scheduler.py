"""The scheduler under every order of events: nothing is lost, nothing runs twice, blocks always add up."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from random_traffic import MAX_STEPS, Traffic, events, limits
from scheduler_harness import EOS, Client, adapter, make, run_all, run_step, said_of, score_at, submit
from swaplora_server.engine.request import FinishReason
from swaplora_server.engine.sampling.constraint import ConstraintPendingError, TokenBits, UnmetConstraintError
from swaplora_server.engine.scheduling.batch import Sampled
from swaplora_server.engine.scheduling.scheduler import MAX_STEPS_PASSED_OVER


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks_and_samples_once() -> None:
    scheduler = make(max_batch_tokens=4)
    client = submit(scheduler, prompt=range(10), max_tokens=1)
    chunks = [[(rows.start, rows.stop) for rows in run_step(scheduler).rows] for _ in range(3)]
    assert chunks == [[(0, 4)], [(4, 8)], [(8, 10)]]
    assert [event.finish_reason for event in client.events] == [FinishReason.LENGTH]


def test_decoding_sequences_go_before_prompts() -> None:
    scheduler = make(max_batch_tokens=6)
    submit(scheduler, prompt=range(3))
    submit(scheduler, prompt=range(20))
    run_step(scheduler)
    rows = {rows.sequence.request.prompt_ids: rows.num_rows for rows in run_step(scheduler).rows}
    assert rows == {(0, 1, 2): 1, tuple(range(20)): 5}


def test_every_sequence_of_a_request_is_released_together_and_once() -> None:
    scheduler = make()
    client = submit(scheduler, n=3, stop_token_ids=frozenset({EOS}))
    run_all(scheduler, EOS)
    assert client.num_released == 1
    assert Counter(event.index for event in client.events) == Counter({0: 1, 1: 1, 2: 1})


def test_a_stop_token_before_min_tokens_does_not_stop() -> None:
    scheduler = make()
    client = submit(scheduler, stop_token_ids=frozenset({EOS}), min_tokens=3)
    for _ in range(4):
        run_step(scheduler, EOS)
    assert [event.finish_reason for event in client.events] == [None, None, None, FinishReason.STOP]


def test_a_row_whose_logits_are_not_finite_fails_alone() -> None:
    scheduler = make()
    clients = [submit(scheduler), submit(scheduler, prompt=range(7, 10))]
    batch = scheduler.schedule()
    scheduler.commit(batch, [Sampled(None), Sampled(3)])
    assert [client.events[-1].finish_reason for client in clients] == [FinishReason.ERROR, None]
    scheduler.check_integrity()


def test_sequences_of_one_adapter_lie_side_by_side() -> None:
    scheduler = make(max_batch_tokens=100)
    for number, name in enumerate(["b", "", "a", "b", "", "a"]):
        submit(scheduler, prompt=[number] * 5, adapters=(adapter(name),) if name else ())
    order = [rows.sequence.request.adapter_key for rows in scheduler.schedule().rows]
    assert [key[0][0] if key else "" for key in order] == ["", "", "a", "a", "b", "b"]


def test_when_blocks_run_out_the_youngest_is_computed_again_and_all_finish() -> None:
    scheduler = make(num_blocks=6, block_size=2)
    clients = [submit(scheduler, prompt=[number] * 4, max_tokens=7) for number in range(2)]
    num_rows = 0
    for _ in range(60):
        num_rows += sum(rows.num_rows for rows in run_step(scheduler).rows)
    assert [len(client.events) for client in clients] == [7, 7]
    assert num_rows > 2 * (4 + 6), "nothing was preempted, so this shows nothing"
    assert scheduler.num_preempted > 0


def test_a_broken_pool_is_noticed() -> None:
    scheduler = make()
    submit(scheduler)
    scheduler.schedule().rows[0].sequence.block_table.pop()
    with pytest.raises(RuntimeError):
        scheduler.check_integrity()


@settings(max_examples=200, deadline=None)
@given(limits, st.lists(events, max_size=40))
def test_whatever_happens_every_sequence_ends_exactly_once(limits: dict[str, Any], events: list[Any]) -> None:
    traffic = Traffic(limits).play(events)
    assert not traffic.scheduler.has_work
    assert traffic.scheduler.pool.num_free == limits["num_blocks"]
    for client in traffic.clients:
        ends = Counter(event.index for event in client.events if event.finish_reason)
        assert ends == Counter(range(client.request.num_sequences))
        assert client.num_released == 1
        tokens = Counter(event.index for event in client.events if event.token_id is not None)
        assert all(count <= client.request.params.max_tokens for count in tokens.values())
        check_hidden(client)


@pytest.mark.parametrize("num_blocks", [200, 30])
def test_a_decoding_sequence_has_a_token_in_every_step_beside_many_prompts_of_which_vectors_are_wanted(
    num_blocks: int,
) -> None:
    scheduler = make(num_blocks=num_blocks, max_batch_tokens=16)
    stream = submit(scheduler, range(6), max_tokens=60)
    run_step(scheduler)
    vectors = [submit(scheduler, range(100 * n, 100 * n + 40), max_tokens=0, wants_hidden=True) for n in range(1, 21)]
    while not all(client.has_ended for client in vectors):
        told = len(stream.events)
        assert sum(rows.num_rows for rows in run_step(scheduler).rows) <= 16
        assert len(stream.events) == told + 1


def check_hidden(client: Client) -> None:
    """A hidden state is there where it was asked for and the prompt was computed, and is its last token's."""
    request = client.request
    has_stopped = any(event.finish_reason is FinishReason.STOP for event in client.events)
    is_there = request.reads is not None and not request.params.max_tokens and has_stopped
    assert (None if request.hidden is None else tuple(request.hidden)) == (request.prompt_ids if is_there else None)


@settings(max_examples=200, deadline=None)
@given(limits, st.lists(events, max_size=40))
def test_whatever_happens_a_prompt_is_scored_once_and_before_anything_else_is_told(
    limits: dict[str, Any], events: list[Any]
) -> None:
    for client in Traffic(limits).play(events).clients:
        request = client.request
        whole = len(request.prompt_ids) - 1 if request.params.num_prompt_logprobs is not None else 0
        assert request.scores == [score_at(position) for position in range(1, len(request.scores) + 1)]
        assert len(request.scores) <= whole
        end = next(event.finish_reason for event in client.events if event.index == 0 and event.finish_reason)
        if end not in (FinishReason.ABORT, FinishReason.ERROR):
            assert client.num_scored_at_first == whole


def test_of_a_prompt_no_more_rows_are_scored_in_a_step_than_may_be_and_others_go_on_beside_it() -> None:
    scheduler = make(max_batch_tokens=16, max_scored_rows=3)
    scored, next_one = (submit(scheduler, range(9), max_tokens=1, num_prompt_logprobs=0) for _ in range(2))
    plain = submit(scheduler, [7] * 8, max_tokens=1)
    steps = [
        [(rows.start, rows.stop, rows.num_scored, rows.is_sampling) for rows in run_step(scheduler).rows]
        for _ in range(3)
    ]
    assert steps[0] == [(0, 3, 3, False), (0, 8, 0, True)]
    assert steps[1] == [(3, 6, 3, False)]
    assert steps[2] == [(6, 9, 2, True), (0, 1, 1, False)]
    run_all(scheduler)
    assert [len(client.request.scores) for client in (scored, next_one, plain)] == [8, 8, 0]
    assert all(len(client.events) == 1 for client in (scored, next_one, plain))


def test_a_hidden_state_that_is_not_finite_fails_its_request_alone_and_is_not_found_again() -> None:
    scheduler = make(max_batch_tokens=100)
    clients = [submit(scheduler, [number] * 9, max_tokens=0, wants_hidden=True) for number in range(2)]
    batch = scheduler.schedule()
    said = [said_of(rows, None) for rows in batch.asking]
    scheduler.commit(batch, [said[0]._replace(hidden=None), said[1]])
    scheduler.check_integrity()
    assert [[event.error_code for event in client.events if event.error] for client in clients] == [
        ["adapter_failed"],
        [],
    ]
    assert clients[0].request.hidden is None
    assert scheduler.pool.num_cached_blocks == 2  # of the one that is sound
    check_hidden(clients[1])


def test_where_no_tokens_are_wanted_a_prompt_is_computed_and_ends() -> None:
    scheduler = make()
    client = submit(scheduler, range(9), max_tokens=0, n=2, num_prompt_logprobs=0)
    run_all(scheduler)
    assert [(event.token_id, event.finish_reason) for event in client.events] == [(None, FinishReason.LENGTH)] * 2
    assert client.num_released == 1


def test_a_prompt_with_a_score_that_is_not_finite_fails_alone() -> None:
    scheduler = make()
    clients = [submit(scheduler, num_prompt_logprobs=0), submit(scheduler, prompt=range(7, 10))]
    scheduler.commit(scheduler.schedule(), [Sampled(3, scores=None), Sampled(3)])
    assert [client.events[-1].finish_reason for client in clients] == [FinishReason.ERROR, None]
    scheduler.check_integrity()


@settings(max_examples=200, deadline=None)
@given(limits, st.lists(events, max_size=40))
def test_whatever_happens_no_sequence_is_passed_over_for_long(limits: dict[str, Any], events: list[Any]) -> None:
    for steps in Traffic(limits).play(events).steps_passed_over():
        assert max(steps) - min(steps) < MAX_STEPS


def test_an_adapter_that_does_not_fit_beside_the_others_lets_later_ones_go_first() -> None:
    scheduler = make(max_step_ranks=16)
    runs = [("large", 12), ("other", 8), ("large", 12), ("small", 4)]
    clients = [submit(scheduler, [n], adapters=(adapter(name, rank=rank),)) for n, (name, rank) in enumerate(runs)]
    clients.append(submit(scheduler, [9]))
    run_step(scheduler)
    assert [bool(client.events) for client in clients] == [True, False, True, True, True]
    run_all(scheduler)
    assert all(client.has_ended for client in clients)


def test_a_request_whose_ranks_are_too_large_to_share_a_step_runs_beside_none_but_the_base() -> None:
    scheduler = make(max_step_ranks=16)
    pair = (adapter("a", rank=12), adapter("b", rank=12))
    clients = [submit(scheduler, adapters=uses) for uses in ((), pair, (adapter("c", rank=1),))]
    run_step(scheduler)
    assert [bool(client.events) for client in clients] == [True, True, False]
    run_all(scheduler)
    assert all(client.has_ended for client in clients)


def test_one_that_was_passed_over_long_enough_goes_before_an_endless_stream_of_others() -> None:
    scheduler = make(max_step_ranks=16, num_blocks=200)
    submit(scheduler, [0], max_tokens=3, adapters=(adapter("common", rank=8),))
    rare = submit(scheduler, [0], adapters=(adapter("rare", rank=16),))
    for num_steps in range(2 * MAX_STEPS_PASSED_OVER):
        submit(scheduler, [num_steps], max_tokens=3, adapters=(adapter("common", rank=8),))
        run_step(scheduler)
        if rare.events:
            break
    assert rare.events
    assert MAX_STEPS_PASSED_OVER <= num_steps < MAX_STEPS_PASSED_OVER + 4


class Held:
    """A constraint that is told when it has found out what may come next, and when nothing may."""

    def __init__(self) -> None:
        self.is_busy = self.is_complete = False
        self.said: list[int] = []
        self.to_come: list[int] = []  # of which each is the only one that may come next

    def forced(self) -> int | None:
        return self.to_come.pop(0) if self.to_come else None

    def allowed(self) -> TokenBits:
        raise NotImplementedError

    def append(self, token_id: int) -> None:
        self.said.append(token_id)


def test_forced_tokens_are_appended_at_once_and_computed_together() -> None:
    scheduler, held = make(), Held()
    held.to_come = [7, 8, 9]
    client = submit(scheduler, max_tokens=9, constrain=lambda: held)
    run_step(scheduler)
    assert held.said[-3:] == [7, 8, 9]
    assert [event.token_id for event in client.events][-3:] == [7, 8, 9]
    [rows] = scheduler.schedule().rows
    assert (rows.num_rows, rows.is_sampling) == (4, True)


def test_one_that_is_held_lets_the_others_go_on_and_then_goes_on_itself() -> None:
    scheduler, held = make(), Held()
    constrained, other = submit(scheduler, constrain=lambda: held), submit(scheduler, range(7, 12))
    run_step(scheduler)
    held.is_busy = True
    for _ in range(2):
        assert [rows.sequence.request for rows in run_step(scheduler).rows] == [other.request]
    held.is_busy = False
    run_all(scheduler)
    assert [len(client.events) for client in (constrained, other)] == [4, 4]
    assert constrained.events[-1].finish_reason is FinishReason.LENGTH


def test_a_step_without_a_token_leaves_its_row_to_be_run_again() -> None:
    scheduler, held = make(max_batch_tokens=8), Held()
    client = submit(scheduler, range(11), constrain=lambda: held)
    run_step(scheduler)
    for expected in [(8, 11), (10, 11), (10, 11)]:
        batch = scheduler.schedule()
        assert [(rows.start, rows.stop) for rows in batch.rows] == [expected]
        scheduler.commit(batch, [Sampled(None, error=ConstraintPendingError())])
        scheduler.check_integrity()
    run_all(scheduler)
    assert [event.token_id for event in client.events] == [1, 1, 1, 1]
    assert held.said == [1, 1, 1, 1]


@pytest.mark.parametrize(("is_complete", "reason"), [(True, FinishReason.STOP), (False, FinishReason.LENGTH)])
def test_one_that_is_held_at_its_last_token_ends_by_what_is_found_out(is_complete: bool, reason: FinishReason) -> None:
    scheduler, held = make(), Held()
    client = submit(scheduler, max_tokens=1, constrain=lambda: held)
    batch = scheduler.schedule()
    held.is_busy = True
    scheduler.commit(batch, [Sampled(1)])
    for _ in range(2):
        assert not run_step(scheduler).rows
    held.is_busy, held.is_complete = False, is_complete
    assert not run_step(scheduler).rows
    assert [(event.token_id, event.finish_reason) for event in client.events] == [(1, None), (None, reason)]


@pytest.mark.parametrize("max_tokens", [2, 9])
def test_one_that_is_complete_ends_and_its_last_token_is_not_the_end(max_tokens: int) -> None:
    scheduler, held = make(), Held()
    client = submit(scheduler, max_tokens=max_tokens, constrain=lambda: held)
    run_step(scheduler)
    batch = scheduler.schedule()
    held.is_complete = True  # by the token that comes now
    scheduler.commit(batch, [Sampled(1)])
    assert not scheduler.schedule().rows
    assert [(event.token_id, event.finish_reason) for event in client.events] == [
        (1, None),
        (1, None),
        (None, FinishReason.STOP),
    ]
    assert client.num_released == 1


def test_what_a_constraint_cannot_keep_to_is_told_in_its_words() -> None:
    scheduler = make()
    client, other = submit(scheduler), submit(scheduler, range(7, 12))
    batch = scheduler.schedule()
    scheduler.commit(batch, [Sampled(None, error=UnmetConstraintError("no such word")), Sampled(1)])
    run_all(scheduler)
    assert [(event.error_code, event.error) for event in client.events] == [("invalid_request", "no such word")]
    assert len(other.events) == 4
