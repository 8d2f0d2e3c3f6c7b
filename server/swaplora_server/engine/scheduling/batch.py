"""One step's work: which tokens of which sequences are computed, what is wanted of them, and what the model said.

A prompt whose log-probabilities are wanted takes as few blocks from the cache as it has scored tokens, and of its rows
no more go into a step than may be scored in one: each of them reaches the output head. Imports no torch.
"""

from dataclasses import dataclass
from typing import NamedTuple

from swaplora_server.engine.request import LAST_PRIORITY, Logprobs, Request, Sequence, Vector
from swaplora_server.kernels.step import Wants


class ScheduledRows(NamedTuple):
    """Tokens [start, stop) of one sequence, computed in one step, and what is wanted of the last of them.

    Of the `num_scored` rows before token `scored_stop` the log-probabilities of the tokens after them are wanted.
    """

    sequence: Sequence
    start: int
    stop: int
    wants: Wants
    num_scored: int = 0
    scored_stop: int = 0

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def is_sampling(self) -> bool:
        return self.wants is Wants.SAMPLE

    @property
    def num_heads(self) -> int:
        """Rows that reach the output head, or whose hidden state does as much."""
        return self.num_scored + (self.wants is not Wants.NOTHING)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work, sorted so that sequences of one adapter lie side by side and the base comes first."""

    rows: tuple[ScheduledRows, ...]

    @property
    def sampling(self) -> tuple[Sequence, ...]:
        return tuple(rows.sequence for rows in self.rows if rows.is_sampling)

    @property
    def is_decoding(self) -> bool:
        """Whether each row is a sequence's newest, samples, and is not scored."""
        return all(rows.num_rows == rows.num_heads == 1 and rows.is_sampling for rows in self.rows)

    @property
    def asking(self) -> tuple[ScheduledRows, ...]:
        """Those of which the model is asked something: a next token, scores of a prompt, or a hidden state."""
        return tuple(rows for rows in self.rows if rows.num_heads)


class Sampled(NamedTuple):
    """What the model said for one sequence that asked: the next token if it samples, and a score for each scored row.

    `token_id` is None when its logits were not finite, or where choosing raised `error`; `scores` when some were not,
    and `hidden`, of one that wants it.
    """

    token_id: int | None
    logprobs: Logprobs | None = None
    error: Exception | None = None
    scores: tuple[Logprobs, ...] | None = ()
    hidden: Vector | None = None


@dataclass(slots=True)
class StepRoom:
    """What is left of a step: rows, rows among them that are scored, and those that the last priority may have."""

    num_rows: int
    num_scored: int
    num_last: int
    takes_whole: bool = False  # prompts, or nothing of them

    def take(self, sequence: Sequence, *, leaves_half: bool = False) -> ScheduledRows | None:
        """The next rows of `sequence` that there is room for, if any. They count when `count` is told.

        One that leaves half takes no more than the other half, unless all that it needs is there.
        """
        num_uncomputed = sequence.num_uncomputed
        num_rows = min(num_uncomputed, self.num_rows)
        if num_rows < num_uncomputed:
            if self.takes_whole:
                return None
            if leaves_half:
                num_rows -= num_rows // 2
        if sequence.priority == LAST_PRIORITY and num_rows > self.num_last:
            num_rows = num_rows if self.takes_whole and self.num_last > 0 else max(0, self.num_last)
        if sequence.num_unscored > self.num_scored:
            num_rows = min(num_rows, sequence.num_scored - sequence.num_computed + self.num_scored)
        return rows_of(sequence, sequence.num_computed, sequence.num_computed + num_rows) if num_rows else None

    def count(self, rows: ScheduledRows) -> None:
        """Give room to rows that `take` found."""
        self._add(rows, -1)

    def take_back(self, rows: ScheduledRows) -> None:
        """Have the room again that `count` gave."""
        self._add(rows, 1)

    def _add(self, rows: ScheduledRows, sign: int) -> None:
        self.num_rows += sign * rows.num_rows
        self.num_scored += sign * rows.num_scored
        if rows.sequence.priority == LAST_PRIORITY:
            self.num_last += sign * rows.num_rows


def rows_of(sequence: Sequence, start: int, stop: int) -> ScheduledRows:
    """Tokens [start, stop) of `sequence`, which samples when they end with its newest token, if it is to have more.

    It is asked for its hidden state instead where that is wanted. Those before the last of a prompt that is to be
    scored are scored, unless they were before.
    """
    request = sequence.request
    wants = _wanted_of_last(request) if stop == sequence.num_tokens else Wants.NOTHING
    if not sequence.num_unscored:
        return ScheduledRows(sequence, start, stop, wants)
    scored_stop = min(stop, len(request.prompt_ids) - 1)
    num_scored = max(0, scored_stop - max(start, sequence.num_scored))
    return ScheduledRows(sequence, start, stop, wants, num_scored, scored_stop)


def _wanted_of_last(request: Request) -> Wants:
    if request.params.max_tokens:
        return Wants.SAMPLE
    return Wants.HIDDEN if request.reads is not None else Wants.NOTHING
