"""Any order of requests, steps and aborts on a small scheduler, and what can be seen of it from outside.

Prompts are cut from a few patterns that begin alike, and what is sampled depends on the tokens alone, so that much of
what is computed could be shared, by right or wrongly.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any
from zlib import crc32

import pytest
from hypothesis import strategies as st

from scheduler_harness import EOS, Client, LabelledKV, adapter, make, said_of, submit
from swaplora_server.engine.request import AdapterUse, Request, Sequence
from swaplora_server.engine.scheduling import scheduler as scheduler_module
from swaplora_server.engine.scheduling.batch import Batch, ScheduledRows

Owner = tuple[tuple[AdapterUse, ...], str | None]  # adapters and salt
Tokens = list[int] | tuple[int, ...]

BLOCK_SIZE = 4
MAX_STEPS = 3  # in the place of MAX_STEPS_PASSED_OVER
PATTERNS = ([0] * 30, [0] * 6 + [1] * 24, [0] * 9 + [1, 0] * 11)
A, HALF_A, B, C = adapter("a", rank=8), adapter("a", 0.5, rank=8), adapter("b", rank=4), adapter("c", rank=64)
OWNERS: tuple[Owner, ...] = (
    *((uses, None) for uses in ((), (A,), (HALF_A,), (A, B), (B, A), (C,))),
    *((uses, "x") for uses in ((), (A,))),
)

submissions = st.fixed_dictionaries(
    {
        "prompt": st.builds(lambda pattern, length: pattern[:length], st.sampled_from(PATTERNS), st.integers(1, 30)),
        "max_tokens": st.integers(0, 9),
        "n": st.integers(1, 3),
        "num_prompt_logprobs": st.sampled_from((None, None, 0)),
        "wants_hidden": st.booleans(),
        "owner": st.sampled_from(OWNERS),
        "tenant": st.sampled_from(("", "", "other")),
        "priority": st.sampled_from((0, 0, 1)),
    }
)
events = st.one_of(
    st.tuples(st.just("submit"), submissions),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("step where one fails"), st.integers(0, 7)),
    st.tuples(st.just("step where a score fails"), st.integers(0, 7)),
    st.tuples(st.just("submit and abort after"), st.integers(1, 3), submissions),
    st.tuples(st.just("abort"), st.integers(0, 20), st.sampled_from((None, 0, 1, 2))),
)
limits = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(10, 30),
        "max_batch_tokens": st.integers(1, 40),
        "max_num_seqs": st.integers(1, 6),
        "max_step_ranks": st.sampled_from((1, 8, 12, 4096)),
        "prefix_cache": st.sampled_from((True, True, True, False)),
        "max_scored_rows": st.sampled_from((1, 2, 7, 256)),
    }
)


@dataclass
class Traffic:
    """One run: every request's client, and in which step each request came and each sequence began."""

    limits: dict[str, Any]
    clients: list[Client] = field(default_factory=list)
    submitted: dict[Request, int] = field(default_factory=dict)
    begun: dict[Sequence, ScheduledRows] = field(default_factory=dict)
    begun_in: dict[Sequence, int] = field(default_factory=dict)
    lacked: set[Sequence] = field(default_factory=set)  # those that ever waited for blocks
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.scheduler = make(block_size=BLOCK_SIZE, **self.limits)
        self.kv = LabelledKV(BLOCK_SIZE)

    def play(self, played: list[tuple[Any, ...]]) -> "Traffic":
        """Let it all happen, let everybody ask for what was asked last, and step until nothing is left."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduler_module, "MAX_STEPS_PASSED_OVER", MAX_STEPS)
            for event in played:
                self._apply(*event)
            for owner in OWNERS if self.clients else ():
                self._submit(self.clients[-1].request.prompt_ids, owner, max_tokens=1)
            for _ in range(3000):
                if self.scheduler.has_work:
                    self.step()
        return self

    def step(self, failing: int | None = None, failing_score: int | None = None) -> None:
        """One step; the `failing`th of those that sample has no finite output, if there are so many.

        Of those that ask for anything the `failing_score`th has none for a token of its prompt.
        """
        batch = self.scheduler.schedule()
        self._note(batch)
        self.kv.run(batch)
        tokens = [None if number == failing else _token(sequence) for number, sequence in enumerate(batch.sampling)]
        of_sampling = iter(tokens)
        said = [said_of(rows, next(of_sampling) if rows.is_sampling else None) for rows in batch.asking]
        if failing_score is not None and failing_score < len(said) and batch.asking[failing_score].num_scored:
            said[failing_score] = said[failing_score]._replace(scores=None)
        self.scheduler.commit(batch, said)
        self.scheduler.check_integrity()

    def steps_passed_over(self) -> list[list[int]]:
        """For every sequence that ran and never waited for blocks, the steps in which others of its line began that had
        come later.
        """
        passed: dict[Sequence, list[int]] = defaultdict(list)
        for waiting, other in product(self.begun_in, self.begun_in):
            step = self.begun_in[other]
            is_later = waiting.arrival < other.arrival and waiting not in self.lacked and _line(waiting) == _line(other)
            if is_later and self.submitted[waiting.request] <= step < self.begun_in[waiting]:
                passed[waiting].append(step)
        return list(passed.values())

    def _apply(self, kind: str, *given: Any) -> None:
        match kind, *given:
            case "submit", fields:
                self._submit(**fields)
            case "submit and abort after", count, fields:
                self._submit(**fields)
                for _ in range(count):
                    self.step()
                self.scheduler.abort(self.clients[-1].request)
            case "step", count:
                for _ in range(count):
                    self.step()
            case "step where one fails", number:
                self.step(number)
            case "step where a score fails", number:
                self.step(failing_score=number)
            case "abort", number, index:
                for client in islice(self.clients, number % max(1, len(self.clients)), None):
                    self.scheduler.abort(client.request, index)
                    break

    def _submit(self, prompt: Tokens, owner: Owner, **fields: Any) -> None:
        adapters, salt = owner
        stops = frozenset({EOS})
        client = submit(self.scheduler, prompt, adapters=adapters, salt=salt, stop_token_ids=stops, **fields)
        self.clients.append(client)
        self.submitted[client.request] = self.num_steps

    def _note(self, batch: Batch) -> None:
        self._check_limits(batch)
        for rows in batch.rows:
            self.begun.setdefault(rows.sequence, rows)
        for sequence in self.scheduler._running:  # noqa: SLF001 - some have no rows yet, where enough are scored
            self.begun_in.setdefault(sequence, self.num_steps)
        self.lacked.update(sequence for sequence in self.scheduler._waiting if sequence.lacking_since is not None)  # noqa: SLF001
        self.num_steps += 1

    def _check_limits(self, batch: Batch) -> None:
        assert sum(rows.num_rows for rows in batch.rows) <= self.limits["max_batch_tokens"]
        assert sum(rows.num_scored for rows in batch.rows) <= self.limits["max_scored_rows"]
        assert self.scheduler.num_running <= self.limits["max_num_seqs"]
        ranks = [rows.sequence.request.adapter_ranks for rows in batch.rows]
        together = {digest: rank for own in ranks for digest, rank in own.items()}
        is_alone = together in ranks
        assert is_alone or sum(together.values()) <= self.limits["max_step_ranks"]


def _line(sequence: Sequence) -> tuple[object, ...]:
    """Those for which this is the same begin in the order in which they come."""
    request = sequence.request
    return request.tenant, request.digests, request.priority


def _token(sequence: Sequence) -> int:
    """Depends on who it is and on what came before, and on nothing else; equal for continuations of one prompt."""
    number = crc32(repr((sequence.request.adapter_key, sequence.token_ids)).encode()) % 12
    return EOS if number == 0 else number % 2
