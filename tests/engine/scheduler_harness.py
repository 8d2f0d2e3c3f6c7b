"""A scheduler without a model: clients that note what they are told, and a cache that knows whose tokens it holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.pooling.kinds import LAST_TOKEN
from swaplora_server.engine.request import AdapterUse, Logprobs, Request, SamplingParams, TokenEvent
from swaplora_server.engine.sampling.constraint import Constraint
from swaplora_server.engine.scheduling.batch import Batch, Sampled, ScheduledRows
from swaplora_server.engine.scheduling.scheduler import Scheduler
from swaplora_server.kernels.step import Wants

EOS = 9


@dataclass
class Client:
    """Everything that one request was told."""

    request: Request = field(init=False)
    events: list[TokenEvent] = field(default_factory=list)
    num_scored_at_first: int | None = None  # of the prompt's tokens, when it heard of the first event
    num_released: int = 0

    def hear(self, event: TokenEvent) -> None:
        if not self.events:
            self.num_scored_at_first = len(self.request.scores)
        self.events.append(event)

    def released(self) -> None:
        self.num_released += 1

    @property
    def num_cached(self) -> int | None:
        return self.request.num_cached_tokens

    @property
    def has_ended(self) -> bool:
        return not self.request.num_unfinished


def adapter(digest: str, scale: float = 1.0, rank: int = 8) -> AdapterUse:
    """An adapter without weights, of a rank nevertheless."""
    weights: Any = SimpleNamespace(rank=rank)
    return AdapterUse(weights, scale, digest)


def make(
    num_blocks: int = 50,
    block_size: int = 4,
    max_batch_tokens: int = 16,
    max_num_seqs: int = 8,
    max_step_ranks: int = 4096,
    prefix_cache: bool = True,
    max_scored_rows: int = 256,
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, block_size),
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        max_step_ranks=max_step_ranks,
        prefix_cache=prefix_cache,
        max_scored_rows=max_scored_rows,
    )


def submit(
    scheduler: Scheduler,
    prompt: Sequence[int] = range(5),
    max_tokens: int = 4,
    n: int = 1,
    *,
    adapters: tuple[AdapterUse, ...] = (),
    salt: str | None = None,
    tenant: str = "",
    priority: int = 0,
    deadline: float | None = None,
    constrain: Callable[[], Constraint] | None = None,
    wants_hidden: bool = False,
    **params: Any,
) -> Client:
    client = Client()
    client.request = Request(
        "r",
        tuple(prompt),
        SamplingParams(max_tokens=max_tokens, **params),
        emit=client.hear,
        adapters=adapters,
        num_sequences=n,
        release=client.released,
        cache_salt=salt,
        tenant=tenant,
        priority=priority,
        deadline=deadline,
        new_constraint=constrain,
        reads=LAST_TOKEN if wants_hidden else None,
    )
    scheduler.add(client.request)
    return client


def said_of(rows: ScheduledRows, token_id: int | None) -> Sampled:
    """A token, where one is sampled; the score of a prompt's token is its position, which nobody else's is.

    The hidden state of a token is all tokens up to it.
    """
    scored = range(rows.scored_stop - rows.num_scored + 1, rows.scored_stop + 1)
    hidden = np.array(rows.sequence.token_ids[: rows.stop], np.float32) if rows.wants is Wants.HIDDEN else None
    scores = tuple(score_at(position) for position in scored)
    return Sampled(token_id if rows.is_sampling else None, scores=scores, hidden=hidden)


def score_at(position: int) -> Logprobs:
    """What stands for the score of the prompt's token at `position`."""
    return Logprobs(float(-position), ())


def run_step(scheduler: Scheduler, token_id: int | None = 1) -> Batch:
    batch = scheduler.schedule()
    scheduler.commit(batch, [said_of(rows, token_id) for rows in batch.asking])
    scheduler.check_integrity()
    return batch


def run_all(scheduler: Scheduler, token_id: int | None = 1) -> int:
    """Step until nothing is left; the number of rows that were computed."""
    num_rows = 0
    for _ in range(3000):
        if not scheduler.has_work:
            break
        num_rows += sum(rows.num_rows for rows in run_step(scheduler, token_id).rows)
    assert not scheduler.has_work
    return num_rows


@dataclass
class LabelledKV:
    """A KV cache whose slots hold, instead of keys and values, all that these depend on: whose they are, and of what.

    Adapters and salt stand in a label as they were given, not as the server hashes them.
    """

    block_size: int
    slots: dict[int, object] = field(default_factory=dict)

    def run(self, batch: Batch) -> None:
        """Write what the batch computes, then read as attention does: every row all that comes before it."""
        for rows in batch.rows:
            for position in range(rows.start, rows.stop):
                self.slots[self._slot(rows, position)] = _label(rows, position)
        for rows in batch.rows:
            for position in range(rows.stop):
                assert self.slots.get(self._slot(rows, position)) == _label(rows, position), "another's keys and values"

    def _slot(self, rows: ScheduledRows, position: int) -> int:
        block = rows.sequence.block_table[position // self.block_size]
        assert block != 0, "block 0 is nobody's"
        return block * self.block_size + position % self.block_size


def _label(rows: ScheduledRows, position: int) -> object:
    request = rows.sequence.request
    uses = tuple((use.digest, use.scale) for use in request.adapters)
    return uses, request.cache_salt, tuple(rows.sequence.token_ids[: position + 1])
