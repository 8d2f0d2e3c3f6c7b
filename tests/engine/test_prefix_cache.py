"""The prefix cache: what was computed is found again, by those it belongs to and by nobody else."""

import time
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console

from random_traffic import Traffic, events, limits
from scheduler_harness import adapter, make, run_all, run_step, submit
from swaplora_server.engine.block_keys import block_key, root_key
from swaplora_server.engine.request import Sequence
from swaplora_server.engine.scheduling.batch import Sampled
from swaplora_server.engine.scheduling.scheduler import Scheduler

PROMPT = list(range(40, 90))  # twelve full blocks of 4 and two tokens


@hypothesis_settings(max_examples=200, deadline=None)
@given(limits, st.lists(events, max_size=40))
def test_whatever_happens_every_row_reads_what_its_own_tokens_and_adapters_make(
    limits: dict[str, Any], events: list[Any]
) -> None:
    traffic = Traffic(limits).play(events)
    for client in traffic.clients:
        assert (client.num_cached or 0) < len(client.request.prompt_ids)
        assert limits["prefix_cache"] or not client.num_cached
    assert sum(rows.start for rows in traffic.begun.values()) <= traffic.scheduler.cache.num_hit_tokens


def cached(scheduler: Scheduler, prompt: list[int], **fields: Any) -> int | None:
    """How much of `prompt` is found when it comes alone."""
    client = submit(scheduler, prompt, **fields)
    run_all(scheduler)
    return client.num_cached


@pytest.mark.parametrize(("length", "found"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (30, 28)])
def test_all_full_blocks_are_found_but_the_one_with_the_last_token(length: int, found: int) -> None:
    scheduler = make()
    prompt = list(range(length))
    assert [cached(scheduler, prompt), cached(scheduler, prompt)] == [0, found]
    assert scheduler.cache.num_looked_up_tokens == 2 * length
    assert scheduler.cache.num_hit_tokens == found


def test_nothing_is_found_when_it_is_switched_off() -> None:
    scheduler = make(prefix_cache=False)
    assert [cached(scheduler, PROMPT) for _ in range(2)] == [0, 0]
    assert scheduler.pool.num_cached_blocks == scheduler.cache.num_looked_up_tokens == 0


def test_a_prompt_that_differs_early_finds_nothing_behind_the_difference() -> None:
    scheduler = make()
    cached(scheduler, PROMPT)
    assert cached(scheduler, [*PROMPT[:9], 0, *PROMPT[10:]]) == 8


def test_only_the_same_adapters_at_the_same_scales_and_with_the_same_salt_share() -> None:
    a, b = adapter("a"), adapter("b")
    owners: list[dict[str, Any]] = [
        *({"adapters": uses} for uses in [(), (a,), (b,), (adapter("a", 0.5),), (a, b), (b, a)]),
        *({"adapters": uses, "salt": salt} for uses in [(), (a,)] for salt in ("x", "y")),
    ]
    scheduler = make(num_blocks=300)
    assert [cached(scheduler, PROMPT, **owner) for owner in owners] == [0] * len(owners)
    assert [cached(scheduler, PROMPT, **owner) for owner in owners] == [48] * len(owners)


def test_no_two_owners_or_blocks_have_one_key() -> None:
    salts = [None, "", "x", "null", '"]', "x\0"]
    owners: list[list[tuple[str, float]]] = [[], [("a", 1.0)], [("a", -1.0)], [("a", 1.0), ("b", 1.0)], [("ab", 1.0)]]
    roots = {root_key(owner, salt) for owner in owners for salt in salts}
    assert len(roots) == len(owners) * len(salts)
    root = root_key([], None)
    keys = {block_key(parent, tokens) for parent in roots for tokens in ([1, 2], [2, 1], [1], [258], [1, 2, 0])}
    assert len(keys) == 5 * len(roots)
    assert root not in keys


def test_a_prompt_that_is_to_be_scored_finds_nothing_and_is_found() -> None:
    scheduler = make(block_size=4, max_batch_tokens=100)
    assert cached(scheduler, PROMPT, num_prompt_logprobs=0) == 0
    assert cached(scheduler, PROMPT, num_prompt_logprobs=0) == 0
    assert cached(scheduler, PROMPT) == (len(PROMPT) - 1) // 4 * 4


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    scheduler = make()
    cached(scheduler, [5, 5, 5], max_tokens=10)
    assert cached(scheduler, [5, 5, 5, *[1] * 10, 6]) == 12


def test_continuations_of_one_prompt_compute_it_once() -> None:
    scheduler = make(max_batch_tokens=100)
    client = submit(scheduler, PROMPT, max_tokens=1, n=4)
    assert run_all(scheduler) == len(PROMPT) + 3 * 2
    assert client.num_cached == 0, "what a request computes itself was not in the cache"
    assert sum(event.finish_reason is not None for event in client.events) == 4


def test_requests_that_come_together_compute_what_they_begin_with_once() -> None:
    scheduler = make(max_batch_tokens=30)
    clients = [submit(scheduler, [*PROMPT[:40], *[number] * 6], max_tokens=1) for number in range(3)]
    clients.append(submit(scheduler, [0] * 6, max_tokens=1))
    run_step(scheduler)
    run_step(scheduler)
    assert clients[-1].has_ended, "whoever shares nothing does not wait with the others"
    run_all(scheduler)
    assert [client.num_cached for client in clients] == [0, 40, 40, 0]


def test_whoever_waits_for_a_block_goes_on_when_the_one_that_computed_it_is_aborted() -> None:
    scheduler = make(max_batch_tokens=8)
    first, second = (submit(scheduler, PROMPT, max_tokens=1) for _ in range(2))
    run_step(scheduler)
    assert scheduler.num_running == 1
    scheduler.abort(first.request)
    run_all(scheduler)
    assert (second.num_cached, second.events[-1].finish_reason) == (8, "length")


def test_a_sequence_that_was_preempted_finds_its_own_blocks_again() -> None:
    scheduler = make(num_blocks=12, max_batch_tokens=64)
    clients = [submit(scheduler, [number] * 17, max_tokens=20) for number in range(2)]
    num_rows = run_all(scheduler)
    assert [len(client.events) for client in clients] == [20, 20]
    assert scheduler.cache.num_hit_tokens > 0, "nothing was preempted, so this shows nothing"
    assert [client.num_cached for client in clients] == [0, 0]
    assert num_rows < 2 * (17 + 19) + 17


def test_a_block_that_was_scheduled_but_never_computed_is_not_found() -> None:
    scheduler = make()
    submit(scheduler, PROMPT)
    scheduler.schedule()
    scheduler.fail_all("the engine has failed", "engine_failed")
    assert scheduler.pool.num_cached_blocks == 0


def test_of_a_prompt_that_is_aborted_amid_its_chunks_only_what_was_computed_is_found() -> None:
    scheduler = make(max_batch_tokens=10)
    client = submit(scheduler, PROMPT)
    run_step(scheduler)
    scheduler.abort(client.request)
    assert cached(scheduler, PROMPT) == 8


def test_nothing_of_a_sequence_whose_output_is_not_finite_is_found() -> None:
    scheduler = make(max_batch_tokens=20)
    submit(scheduler, PROMPT)
    assert run_all(scheduler, token_id=None) == len(PROMPT)
    assert scheduler.pool.num_cached_blocks == 0
    assert cached(scheduler, PROMPT) == 0


def test_the_least_recently_used_goes_first_and_a_tail_before_its_head() -> None:
    scheduler = make(num_blocks=12)
    for token in (1, 2):
        cached(scheduler, [token] * 21, max_tokens=1)
    cached(scheduler, [1] * 9, max_tokens=1)  # uses the head of the first again
    cached(scheduler, [3] * 25, max_tokens=1)
    left = [Sequence(submit(make(), [token] * 21).request, 0) for token in (1, 2)]
    assert [len(scheduler.cache.find(sequence)) for sequence in left] == [2, 3]


def test_what_is_shared_already_costs_no_room() -> None:
    scheduler = make(num_blocks=14, max_batch_tokens=100)
    clients = [submit(scheduler, PROMPT[:41], max_tokens=2) for _ in range(2)]
    run_step(scheduler)
    run_step(scheduler)
    assert scheduler.num_running == 1
    assert [len(client.events) for client in clients] == [2, 1]


def test_what_a_step_costs_is_reported() -> None:
    scheduler = make(num_blocks=20_000, block_size=16, max_batch_tokens=2**20, max_num_seqs=64)
    for number in range(64):
        submit(scheduler, [number] * 500, max_tokens=200)
    seconds: list[float] = []
    while scheduler.has_work:
        began = time.perf_counter()
        batch = scheduler.schedule()
        scheduler.commit(batch, [Sampled(1)] * 64)
        seconds.append(time.perf_counter() - began)
    Console().print(f"\nschedule and commit of 64 sequences: {median(seconds[1:]) * 1e6:.0f} µs a step")
    assert scheduler.pool.num_cached_blocks == 64 * (699 // 16)
