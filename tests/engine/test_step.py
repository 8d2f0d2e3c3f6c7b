"""A step's plan: each row once, in its own block, with its request's adapters; and what holds the step that runs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.engine.request import AdapterUse, Logprobs, Request, SamplingParams, Sequence
from swaplora_server.engine.scheduling.batch import ScheduledRows, rows_of
from swaplora_server.engine.step import AdapterMismatchError, Planner, running, use
from swaplora_server.kernels.backend import RunningStep
from swaplora_server.kernels.step import Runs, Segments, StepPlan, Wants

BLOCK_SIZE = 4
ADAPTERS = [AdapterWeights(f"sha256:{number}", {}) for number in range(3)]
USES = st.lists(
    st.tuples(st.sampled_from(ADAPTERS), st.sampled_from([0.5, 1.0])), max_size=2, unique_by=lambda use: use[0].digest
)


@dataclass(frozen=True)
class Chunk:
    """What a step computes of one sequence."""

    num_tokens: int
    start: int
    stop: int
    invoked_at: int
    uses: tuple[tuple[AdapterWeights, float], ...]
    num_scored: int | None  # tokens of it that were scored before; None: its prompt is not to be scored


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    num_tokens = draw(st.integers(1, 14))
    start = draw(st.integers(0, num_tokens - 1))
    stop = draw(st.integers(start + 1, num_tokens))
    num_scored = draw(st.none() | st.integers(start, num_tokens - 1))
    return Chunk(num_tokens, start, stop, draw(st.integers(0, num_tokens - 1)), tuple(draw(USES)), num_scored)


def scheduled(steps: list[list[Chunk]]) -> list[list[ScheduledRows]]:
    """Sequences with blocks that nobody shares."""
    free = iter(np.random.default_rng(1).permutation(np.arange(1, 2000)).tolist())
    made: list[list[ScheduledRows]] = []
    for step in steps:
        rows = []
        for chunk in step:
            adapters = tuple(AdapterUse(weights, scale, weights.digest) for weights, scale in chunk.uses)
            prompt = tuple(next(free) for _ in range(chunk.num_tokens))  # any tokens, as long as they differ
            params = SamplingParams(1, num_prompt_logprobs=None if chunk.num_scored is None else 0)
            request = Request("r", prompt, params, lambda _event: None, adapters, invoked_at=chunk.invoked_at)
            request.scores += [Logprobs(-1.0, ())] * (chunk.num_scored or 0)
            sequence = Sequence(request, 0)
            sequence.block_table = [next(free) for _ in range(-(-chunk.num_tokens // BLOCK_SIZE))]
            rows.append(rows_of(sequence, chunk.start, chunk.stop))
        made.append(sorted(rows, key=lambda own: (own.sequence.request.adapter_key, own.sequence.arrival)))
    return made


def rows_in(rows: list[ScheduledRows]) -> list[tuple[Sequence, int]]:
    """Each row's sequence and position."""
    return [(own.sequence, position) for own in rows for position in range(own.start, own.stop)]


def applied(segments: Segments, num_rows: int) -> list[list[tuple[str, float]]]:
    """Of each row, the adapters that apply to it, in the order of the segments."""
    found: list[list[tuple[str, float]]] = [[] for _ in range(num_rows)]
    for weights, scale, start, stop, _ in segments:
        for row in range(start, stop):
            found[row].append((weights.digest, scale))
    return found


def is_scored(sequence: Sequence, position: int) -> bool:
    """Whether what the row says of the token after it is wanted, and not there yet."""
    request = sequence.request
    is_wanted = request.params.num_prompt_logprobs is not None
    return is_wanted and len(request.scores) <= position < len(request.prompt_ids) - 1


def check(rows: list[ScheduledRows], plan: StepPlan) -> None:
    each = rows_in(rows)
    runs = plan.runs
    assert plan.token_ids.tolist() == [sequence.token_ids[position] for sequence, position in each]
    assert runs.positions.tolist() == [position for _, position in each]
    assert runs.slots.tolist() == [
        sequence.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for sequence, position in each
    ]
    assert len(set(runs.slots.tolist())) == len(each) == runs.num_rows, "no two rows are written to one place"
    assert np.concatenate([np.arange(*span) for span in zip(runs.starts, runs.stops, strict=True)]).tolist() == list(
        range(len(each))
    )
    for at, length, own in zip(runs.block_starts, runs.lengths, rows, strict=True):
        assert runs.blocks[at : at + len(own.sequence.block_table)].tolist() == own.sequence.block_table
        assert length == own.stop
    sampling = {id(own.sequence) for own in rows if own.is_sampling}
    ends = [own.stop - 1 for own in rows for _ in range(own.num_rows)]
    wanted = [
        Wants.SAMPLE
        if id(sequence) in sampling and position == end
        else Wants.SCORE
        if is_scored(sequence, position)
        else Wants.NOTHING
        for (sequence, position), end in zip(each, ends, strict=True)
    ]
    assert plan.wants.tolist() == wanted
    assert plan.head_rows.tolist() == ([row for row, want in enumerate(wanted) if want] or [0])
    uses = [
        [(use.digest, use.scale) for use in sequence.request.adapters if position >= sequence.request.invoked_at]
        for sequence, position in each
    ]
    assert applied(plan.tokens, len(each)) == uses
    assert sum(own.num_heads for own in rows) == sum(map(bool, wanted))
    of_head = [used for used, want in zip(uses, wanted, strict=True) if want]
    assert applied(plan.head, len(of_head)) == of_head
    for segments in (plan.tokens, plan.head):
        assert segments.starts.tolist() == sorted(segments.starts.tolist())
        assert segments.starts.tolist() == [segment.start for segment in segments]
        assert segments.stops.tolist() == [segment.stop for segment in segments]
        assert segments.scales.tolist() == [segment.scale for segment in segments]


@given(st.lists(st.lists(chunks(), min_size=1, max_size=6), min_size=1, max_size=3))
def test_a_plan_has_each_row_once_in_its_own_slot_with_its_own_adapters(steps: list[list[Chunk]]) -> None:
    """One planner for all steps: what it keeps of one must not reach the next."""
    planner = Planner(BLOCK_SIZE)
    for rows in scheduled(steps):
        check(rows, planner.plan(rows))


@given(st.lists(chunks(), min_size=1, max_size=6), st.integers(1, 4))
def test_what_is_kept_while_decoding_is_what_would_be_made_anew(step: list[Chunk], num_steps: int) -> None:
    planner = Planner(BLOCK_SIZE)
    (rows,) = scheduled([step])
    for number in range(num_steps):
        for own in rows:
            own.sequence.token_ids.append(3000 + number)
            own.sequence.block_table.append(4000 + 50 * number + len(own.sequence.block_table))
        decoding = [rows_of(own.sequence, own.sequence.num_tokens - 1, own.sequence.num_tokens) for own in rows]
        plan, anew = planner.plan(decoding), Planner(BLOCK_SIZE).plan(decoding)
        assert (plan.runs.slots.tolist(), plan.wants.tolist()) == (anew.runs.slots.tolist(), anew.wants.tolist())
        assert (list(plan.tokens), list(plan.head)) == (list(anew.tokens), list(anew.head))
        assert planner.plan(decoding).tokens is plan.tokens


def planned(*adapters: AdapterUse) -> tuple[list[ScheduledRows], Planner]:
    sequence = Sequence(Request("r", (1, 2), SamplingParams(1), lambda _event: None, adapters), 0)
    sequence.block_table = [1]
    return [rows_of(sequence, 0, 2)], Planner(BLOCK_SIZE)


def test_weights_of_another_digest_are_refused_before_a_row_runs() -> None:
    rows, planner = planned(AdapterUse(ADAPTERS[0], 1.0, ADAPTERS[1].digest))
    with pytest.raises(AdapterMismatchError, match="sha256:1"):
        planner.plan(rows)


def test_a_sequence_without_a_block_for_a_row_is_refused_and_takes_no_neighbours() -> None:
    with pytest.raises(ValueError, match="fewer blocks"):
        Runs([0, 0], [5, 3], [[1], [2, 3]], BLOCK_SIZE)


def test_an_idle_planner_keeps_no_adapter() -> None:
    rows, planner = planned(AdapterUse(ADAPTERS[0], 1.0, ADAPTERS[0].digest))
    plan = planner.plan(rows)
    assert planner.plan(rows).tokens is plan.tokens
    planner.forget_adapters()
    assert planner.plan(rows).tokens is not plan.tokens


def test_one_step_runs_at_a_time_and_none_stays_behind() -> None:
    step: Any = RunningStep(None, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="outside"):
        running()
    with use(step), pytest.raises(RuntimeError, match="already"), use(step):
        pass
    with pytest.raises(KeyError), use(step):
        raise KeyError(running() is step)
    with pytest.raises(RuntimeError, match="outside"):
        running()
