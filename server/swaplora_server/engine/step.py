"""A step's plan, made of what was scheduled, and the one holder that carries the running step through the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np

from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.engine.request import AdapterUse, Request
from swaplora_server.engine.scheduling.batch import ScheduledRows
from swaplora_server.kernels.backend import RunningStep
from swaplora_server.kernels.step import Ints, Runs, Segment, Segments, StepPlan, Wants

_running: ContextVar[RunningStep | None] = ContextVar("running_step", default=None)


@contextmanager
def use(step: RunningStep) -> Iterator[None]:
    """Hold `step` for the duration of one forward pass on this thread; refuses to nest and always clears."""
    if _running.get() is not None:
        raise RuntimeError("a step is already running on this thread")
    token = _running.set(step)
    try:
        yield
    finally:
        _running.reset(token)


def running() -> RunningStep:
    """The running step. Raises RuntimeError outside of `use`."""
    step = _running.get()
    if step is None:
        raise RuntimeError("a module that needs a step ran outside of one")
    return step


class AdapterMismatchError(RuntimeError):
    """A row was about to run with weights other than those its request was admitted with."""


def checked_weights(use: AdapterUse) -> AdapterWeights:
    """The weights of `use`, if they are still those that the request was admitted with."""
    if use.weights.digest != use.digest:
        raise AdapterMismatchError(f"admitted with {use.digest}, about to run with {use.weights.digest}")
    return use.weights


class _Span(NamedTuple):
    """The rows of one sequence that its request's adapters apply to, and its place among those that reach the head."""

    adapter_key: tuple[tuple[str, float], ...]
    start: int
    stop: int
    head_start: int
    head_stop: int
    wants: Wants  # of its last row
    scored: tuple[int, int]  # its rows that are scored: how many, and where among the step's rows they end


class _Adapters(NamedTuple):
    """What follows from `spans` alone."""

    spans: list[_Span]
    wants: Ints
    head_rows: Ints
    tokens: Segments
    head: Segments


class Planner:
    """Makes plans. What adapters have to do with a step is kept from the last one while nothing about it changes."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.forget_adapters()

    def forget_adapters(self) -> None:
        """Keep nothing, so that an idle engine keeps no adapter alive."""
        nothing = np.empty(0, np.int64)
        self._kept = _Adapters([], nothing, nothing, Segments(), Segments())

    def plan(self, scheduled: Sequence[ScheduledRows]) -> StepPlan:
        """Raises AdapterMismatchError."""
        runs = Runs(
            [rows.start for rows in scheduled],
            [rows.stop for rows in scheduled],
            [rows.sequence.block_table for rows in scheduled],
            self._block_size,
        )
        token_ids = [token for rows in scheduled for token in rows.sequence.token_ids[rows.start : rows.stop]]
        adapters = self._adapters(scheduled)
        return StepPlan(
            np.array(token_ids, np.int64), runs, adapters.wants, adapters.head_rows, adapters.tokens, adapters.head
        )

    def _adapters(self, scheduled: Sequence[ScheduledRows]) -> _Adapters:
        spans = _spans(scheduled)
        if spans != self._kept.spans:
            wants = _wants(scheduled, spans)
            head_rows = np.flatnonzero(wants)
            requests = [rows.sequence.request for rows in scheduled]
            self._kept = _Adapters(
                spans,
                wants,
                head_rows if len(head_rows) else np.zeros(1, np.int64),
                _segments(requests, [(span.start, span.stop) for span in spans]),
                _segments(requests, [(span.head_start, span.head_stop) for span in spans]),
            )
        return self._kept


def _spans(scheduled: Sequence[ScheduledRows]) -> list[_Span]:
    spans: list[_Span] = []
    start = head_start = 0
    for sequence, first, stop, wants, num_scored, scored_stop in scheduled:
        request = sequence.request
        num_of_base = min(stop - first, max(0, request.invoked_at - first))  # before its adapter's invocation
        num_scored_of_base = min(num_scored, max(0, request.invoked_at - (scored_stop - num_scored)))
        head_stop = head_start + num_scored + (wants is not Wants.NOTHING)
        spans.append(
            _Span(
                request.adapter_key,
                start + num_of_base,
                start + stop - first,
                head_start + num_scored_of_base,
                head_stop,
                wants,
                (num_scored, start + scored_stop - first),
            )
        )
        start, head_start = start + stop - first, head_stop
    return spans


def _wants(scheduled: Sequence[ScheduledRows], spans: Sequence[_Span]) -> Ints:
    """Of a sequence's rows the last one alone may be wanted, and those that are scored."""
    wants = np.zeros(sum(rows.num_rows for rows in scheduled), np.int64)
    stop = 0
    for rows, span in zip(scheduled, spans, strict=True):
        num_scored, scored_stop = span.scored
        stop += rows.num_rows
        wants[stop - 1] = rows.wants
        wants[scored_stop - num_scored : scored_stop] = Wants.SCORE
    return wants


def _segments(requests: Sequence[Request], spans: Sequence[tuple[int, int]]) -> Segments:
    """Segments over each request's rows; neighbours with the same adapters share one."""
    joined: list[tuple[Request, int, int]] = []
    for request, (start, stop) in zip(requests, spans, strict=True):
        if joined and joined[-1][0].adapter_key == request.adapter_key and joined[-1][2] == start:
            joined[-1] = (request, joined[-1][1], stop)
        elif start < stop:
            joined.append((request, start, stop))
    return Segments(
        [
            Segment(checked_weights(use), use.scale, start, stop, use.route)
            for request, start, stop in joined
            for use in request.adapters
        ]
    )
