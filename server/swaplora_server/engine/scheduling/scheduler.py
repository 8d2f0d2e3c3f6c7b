"""Continuous batching: who runs in the next step, and what becomes of its tokens. Pure decisions: imports no torch.

Scheduling is iteration-level (Orca): sequences join and leave between any two steps. Decoding sequences come first, one
row each; what is left of the token budget goes to prefill, in chunks (chunked prefill), in order of arrival. A prompt
that would take all of it leaves half to those who wait. What the prefix cache holds of a prompt is not computed again.
When KV blocks run out, the youngest running sequence of whoever holds most of them is preempted: it gives its blocks
back and is recomputed later, but for what the cache then still holds. The oldest of all is spared, so that something
always comes to its end. A place is taken likewise, of the sequence of which least is computed, for one whose like have
less than half as many, or fewer where nobody who waits has begun for long: who asks for little finds a place within a
few steps, however long the answers of those who have all. That costs a block's tokens, computed again; without the
cache it costs all, and who lost its place is spared until it comes to a next token.

Waiting sequences begin in the order of the waiting line. One lets later ones go before it while its adapters do not fit
beside those that run, and while another sequence is computing the very block it needs next, which it then shares. It
does so for a bounded number of steps. One that lacks blocks lets those pass that fit beside it: it begins at the latest
when all that ran before it have ended.

What fails while one sequence is looked at ends its request, and that alone.
"""

import math
import time
from collections.abc import Iterable, Mapping

import structlog

from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.prefix_cache import PrefixCache
from swaplora_server.engine.request import (
    OVERDUE,
    OVERDUE_CODE,
    FinishReason,
    Logprobs,
    Request,
    Sequence,
    TokenEvent,
    Vector,
)
from swaplora_server.engine.sampling.constraint import ConstraintPendingError, UnmetConstraintError
from swaplora_server.engine.scheduling.batch import Batch, Sampled, ScheduledRows, StepRoom
from swaplora_server.engine.scheduling.holdings import Places, Standing, least_computed, standing
from swaplora_server.engine.scheduling.step_ranks import StepRanks
from swaplora_server.engine.scheduling.waiting_line import GENERATED_WEIGHT, PROMPT_WEIGHT, WaitingLine
from swaplora_server.kernels.step import Wants

_log = structlog.get_logger(__name__)
MAX_STEPS_PASSED_OVER = 64  # some seconds; then nothing begins before the one that waits
FAR_BEHIND = 2  # times as many places as one who waits would have: then it need not wait for one to get free
STEPS_BETWEEN_TAKINGS = 2  # of places: what is computed again is little beside all that is


class Scheduler:
    """Owns every live sequence and the block pool. Only the engine's thread calls it.

    max_step_ranks bounds the sum of the ranks of the distinct adapters that run, unless one request alone is beyond it;
    max_scored_rows the rows of a step that are scored, and so the logits of prompts that are in memory at once.
    With takes_whole, a prompt is computed in one step or not yet, and max_batch_tokens must hold the longest.
    With appends_forced, tokens that alone may come next are appended without a step, and computed together in the next.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        max_step_ranks: int,
        prefix_cache: bool,
        max_scored_rows: int = 256,
        appends_forced: bool = True,
        takes_whole: bool = False,
    ) -> None:
        self.pool = pool
        self.cache = PrefixCache(pool, is_on=prefix_cache)
        self._max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs
        self._max_scored_rows = max_scored_rows
        self._appends_forced = appends_forced
        self._takes_whole = takes_whole
        self._ranks = StepRanks(max_step_ranks)
        self.num_failed = 0  # requests that `fail` ended; only grows, any thread may read it
        self.num_preempted = 0  # sequences that gave their blocks back; the same
        self._num_steps = 0
        self._last_begun_in = 0  # the step in which anybody did, or nobody waited
        self._last_taken_in = -STEPS_BETWEEN_TAKINGS  # the step in which one had to give its place to another
        self._next_deadline = math.inf  # of those that are here, or were
        self._waiting = WaitingLine()
        self._running: dict[Sequence, None] = {}  # in the order in which they began

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(len(self._waiting) or self._running)

    def add(self, request: Request) -> None:
        """Queue every sequence of `request`. The caller has checked that one of them fits the pool by itself."""
        if not len(self._waiting):
            self._last_begun_in = self._num_steps
        for index in range(request.num_sequences):
            self._waiting.add(Sequence(request, index))
        self._next_deadline = min(self._next_deadline, request.deadline or math.inf)

    def schedule(self) -> Batch:
        """Choose the next step's rows and give them blocks."""
        self._num_steps += 1
        self._end_overdue(time.monotonic())
        self._make_place()
        room = StepRoom(self._max_batch_tokens, self._max_scored_rows, self._takes_whole)
        chosen: list[ScheduledRows] = []
        order = self._standing()
        for sequence in sorted(self._running, key=lambda sequence: (sequence.num_uncomputed > 1, order[sequence])):
            try:
                self._finish_late(sequence)
                rows = None if sequence.is_held else room.take(sequence, leaves_half=len(self._waiting) > 0)
                if rows and sequence in self._running and self._make_room(rows, chosen, order):
                    chosen.append(rows)
                    room.count(rows)
            except Exception as error:  # noqa: BLE001 - one request's boundary
                self.fail(sequence.request, error)
        chosen += self._admit(room, chosen)
        chosen = [rows for rows in chosen if rows.sequence.block_table]  # a sibling may have failed since
        chosen = [self._with_rest(rows, room) for rows in chosen]
        return Batch(tuple(sorted(chosen, key=lambda rows: (rows.sequence.request.adapter_key, rows.sequence.arrival))))

    def commit(self, batch: Batch, outputs: Iterable[Sampled]) -> None:
        """Record that `batch` ran: advance every sequence, append what was sampled, finish what ended."""
        of_asking = iter(outputs)
        for rows in batch.rows:
            sampled = next(of_asking) if rows.num_heads else None
            try:
                self._commit(rows, sampled)
            except Exception as error:  # noqa: BLE001 - one request's boundary
                self.fail(rows.sequence.request, error)

    def abort(self, request: Request, index: int | None = None) -> None:
        """End the request's unfinished sequences, or the one at `index`, and free what they hold."""
        for sequence in [*self._running, *self._waiting]:
            if sequence.request is request and index in (None, sequence.index):
                self._finish(sequence, TokenEvent(sequence.index, finish_reason=FinishReason.ABORT))

    def fail(self, request: Request, error: Exception) -> None:
        """End what is unfinished of the one request that `error` is the fault of. The log is told what it was."""
        self.num_failed += 1
        if isinstance(error, UnmetConstraintError):
            _log.info("a request asked for what cannot be", request=request.request_id, reason=str(error))
            message, code = str(error), "invalid_request"
        else:
            _log.error("a request failed alone", request=request.request_id, error=repr(error), exc_info=error)
            message, code = "the server failed on this request; its log says more", "internal_error"
        for sequence in [*self._running, *self._waiting]:
            if sequence.request is request:
                self._finish(sequence, TokenEvent(sequence.index, None, None, FinishReason.ERROR, message, code))

    def fail_all(self, message: str, code: str) -> None:
        """End everything with an error: the engine cannot go on."""
        for sequence in [*self._running, *self._waiting]:
            self._finish(sequence, TokenEvent(sequence.index, None, None, FinishReason.ERROR, message, code))

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the pool is whole and held by exactly the running sequences."""
        self.pool.check_integrity(sequence.block_table for sequence in self._running)
        if any(sequence.block_table for sequence in self._waiting):
            raise RuntimeError("blocks are held by a sequence that does not run")
        ranks = {digest: rank for sequence in self._running for digest, rank in sequence.request.adapter_ranks.items()}
        if self._ranks.total != sum(ranks.values()):
            raise RuntimeError("the ranks that are counted are not those of the adapters that run")

    def _with_rest(self, rows: ScheduledRows, room: StepRoom) -> ScheduledRows:
        """`rows`, or as many more of their prompt as nobody else took the room of."""
        if not room.num_rows or rows.stop == rows.sequence.num_tokens:
            return rows
        room.take_back(rows)
        more = room.take(rows.sequence)
        if more is None or not self.pool.can_grow(rows.sequence.block_table, more.stop):
            more = rows
        self.pool.grow(rows.sequence.block_table, more.stop)
        room.count(more)
        return more

    def _end_overdue(self, now: float) -> None:
        """End what was not done in its time, whether it runs or waits."""
        if now < self._next_deadline:
            return
        self._next_deadline = math.inf
        for sequence in [*self._running, *self._waiting]:
            deadline = sequence.request.deadline or math.inf
            if deadline <= now:
                self._finish(
                    sequence, TokenEvent(sequence.index, None, None, FinishReason.ERROR, OVERDUE, OVERDUE_CODE)
                )
            else:
                self._next_deadline = min(self._next_deadline, deadline)

    def _admit(self, room: StepRoom, chosen: list[ScheduledRows]) -> list[ScheduledRows]:
        """Begin waiting sequences while they fit, in their order but for those that can let others go first.

        Rows of `chosen` give their room back where their sequence gives its place up.
        """
        begun: list[ScheduledRows] = []
        lacking: Sequence | None = None  # the first for which there are too few blocks
        places: Places | None = None  # as long as nobody begins or ends
        for sequence in self._waiting.turns():
            if not self._has_place and places is None:
                places = self._places()
            givers = [] if self._has_place or places is None else places.givers(sequence, FAR_BEHIND)
            if not room.num_rows or not (self._has_place or givers):
                break
            try:
                if sequence.num_generated and (self._finish_late(sequence) or sequence.is_held):
                    continue
                if lacking is not None and not self._fits_beside(lacking, sequence):
                    continue
                if self._should_wait(sequence):
                    if self._is_overdue(sequence):
                        break
                    continue
                found = self.cache.find(sequence)
                if self._can_admit(sequence, found):
                    if givers:
                        self._take_place(least_computed(givers), room, chosen)
                    places = None
                    begun += self._begin(sequence, found, room)
                elif lacking is None:
                    lacking = sequence
            except Exception as error:  # noqa: BLE001 - one request's boundary
                self.fail(sequence.request, error)
                places = None
        return begun

    @property
    def _has_place(self) -> bool:
        """Whether one more may run, and has a block to begin with."""
        return len(self._running) < self._max_num_seqs and len(self._running) < self.pool.num_free

    def _should_wait(self, sequence: Sequence) -> bool:
        """Whether its adapters do not fit beside those that run, or its next block will soon be there to share."""
        should_wait = not self._ranks.fits(sequence.request.adapter_ranks) or (
            not self._is_overdue(sequence) and self.cache.is_worth_waiting(sequence)
        )
        if should_wait and sequence.passed_over_since is None:
            sequence.passed_over_since = self._num_steps
        return should_wait

    def _is_overdue(self, sequence: Sequence) -> bool:
        since = sequence.passed_over_since
        return since is not None and self._num_steps - since >= MAX_STEPS_PASSED_OVER

    def _can_admit(self, sequence: Sequence, found: list[int]) -> bool:
        """Whether its whole prompt fits and leaves each running sequence a block, lest one be preempted at once."""
        sequence.num_lacking = self.pool.num_taken(found, sequence.num_tokens)
        return self._has_enough(sequence, sequence.num_lacking + len(self._running) <= self.pool.num_free)

    def _fits_beside(self, lacking: Sequence, sequence: Sequence) -> bool:
        """Whether all that began since the first came to lack blocks, and the second, leave it as many as it takes.

        The others are counted as long as they may get. One that was found to take more blocks than there are is not
        looked at again.
        """
        if sequence.num_lacking + len(self._running) > self.pool.num_free:
            return False
        since = [other for other in self._running if (other.begun_in or 0) >= (lacking.lacking_since or 0)]
        num_blocks = sum(self.pool.blocks_for(other.max_num_tokens) for other in [*since, sequence])
        num_blocks += self.pool.blocks_for(lacking.num_tokens) + len(since) + 1
        return self._has_enough(sequence, num_blocks <= self.pool.num_blocks)

    def _has_enough(self, sequence: Sequence, has_enough: bool) -> bool:
        """Take note of when there were first too few blocks for it."""
        if not has_enough and sequence.lacking_since is None:
            sequence.lacking_since = self._num_steps
        return has_enough

    def _begin(self, sequence: Sequence, found: list[int], room: StepRoom) -> list[ScheduledRows]:
        """Let a sequence that fits run from the end of the blocks that were found for it.

        It has no rows yet where the step scores as many as it may.
        """
        self._waiting.remove(sequence)
        self._running[sequence] = None
        self._ranks.add(sequence.request.adapter_ranks)
        self.cache.begin(sequence, found)
        if sequence.begun_in is None:  # who was preempted has paid
            self._waiting.charge(sequence, sequence.num_uncomputed, PROMPT_WEIGHT)
        sequence.begun_in = self._last_begun_in = self._num_steps
        sequence.passed_over_since = sequence.lacking_since = None
        if sequence.request.begun_at is None:
            sequence.request.begun_at = time.monotonic()
        rows = room.take(sequence)
        if rows is None:
            return []
        self.pool.grow(sequence.block_table, rows.stop)
        room.count(rows)
        return [rows]

    def _standing(self) -> dict[Sequence, Standing]:
        """Of those that run: the least goes first, and the greatest gives its blocks back first.

        While no step can use up all blocks, age alone counts.
        """
        num_left = self.pool.num_free - len(self._running)
        return standing(self._running, is_scarce=num_left < self.pool.blocks_for(self._max_batch_tokens))

    def _make_place(self) -> None:
        """Where for long nobody has begun who waits, take a place for the first in line, if its like have fewer.

        So a flood of long answers has no more of all places than its share for longer than that.
        """
        if self._num_steps - self._last_begun_in < MAX_STEPS_PASSED_OVER or not self._running:
            return
        first = next(self._waiting.turns(), None)
        if first is not None and (givers := Places(self._running, self._num_steps).givers(first)):
            self._preempt(least_computed(givers))
        self._last_begun_in = self._num_steps

    def _places(self) -> Places | None:
        """Where all places are taken, now and then, those that one may be given of."""
        if self._num_steps - self._last_taken_in < STEPS_BETWEEN_TAKINGS or len(self._running) < self._max_num_seqs:
            return None
        return Places(self._running, self._num_steps)

    def _take_place(self, giving: Sequence, room: StepRoom, chosen: list[ScheduledRows]) -> None:
        self._preempt(giving)
        self._last_taken_in = self._num_steps
        for rows in [rows for rows in chosen if rows.sequence is giving]:
            chosen.remove(rows)
            room.take_back(rows)

    def _make_room(self, rows: ScheduledRows, chosen: list[ScheduledRows], order: Mapping[Sequence, Standing]) -> bool:
        """Grow a sequence for its next rows, preempting others; False when it was its own turn to be."""
        sequence = rows.sequence
        while not self.pool.can_grow(sequence.block_table, rows.stop):
            scheduled = {id(rows.sequence) for rows in chosen}
            victim = max((other for other in self._running if id(other) not in scheduled), key=order.__getitem__)
            self._preempt(victim)
            if victim is sequence:
                return False
        self.pool.grow(sequence.block_table, rows.stop)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self._waiting.add(sequence)
        sequence.was_preempted = True
        self.num_preempted += 1

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence out of those that run, and its blocks from it."""
        del self._running[sequence]
        self._ranks.remove(sequence.request.adapter_ranks)
        self.cache.end(sequence)

    def _commit(self, rows: ScheduledRows, sampled: Sampled | None) -> None:
        """Record that `rows` ran, unless their request has ended since, as where a sibling failed."""
        sequence = rows.sequence
        if not sequence.block_table:
            return
        is_pending = sampled is not None and isinstance(sampled.error, ConstraintPendingError)
        stop = rows.stop - is_pending  # its last row is run again
        sequence.num_computed = stop
        self.cache.publish(sequence, rows.start, stop)
        if sampled is not None and sampled.scores is None:
            self._fail_not_finite(sequence)
            return
        if sampled is not None and sampled.scores:
            sequence.request.scores += sampled.scores
        if is_pending:
            return
        if sampled is not None and rows.is_sampling:
            self._append(sequence, sampled)
        elif sampled is not None and rows.wants is Wants.HIDDEN:
            self._finish_hidden(sequence, sampled.hidden)
        elif rows.stop == sequence.num_tokens:
            self._finish(sequence, TokenEvent(sequence.index, finish_reason=FinishReason.LENGTH))

    def _finish_hidden(self, sequence: Sequence, hidden: Vector | None) -> None:
        if hidden is None:
            self._fail_not_finite(sequence)
            return
        sequence.request.hidden = hidden
        self._finish(sequence, TokenEvent(sequence.index, finish_reason=FinishReason.STOP))

    def _fail_not_finite(self, sequence: Sequence) -> None:
        message = "the output is not finite: the adapter's weights are too large for this prompt"
        failed = TokenEvent(sequence.index, None, None, FinishReason.ERROR, message, "adapter_failed")
        self.cache.disown(sequence)
        self._finish(sequence, failed)

    def _append(self, sequence: Sequence, sampled: Sampled) -> None:
        if sampled.error is not None:
            raise sampled.error
        if sampled.token_id is None:
            self._fail_not_finite(sequence)
            return
        goes_on = self._append_token(sequence, sampled.token_id, sampled.logprobs)
        while goes_on and self._appends_forced and (token_id := sequence.forced) is not None:
            goes_on = self._append_token(sequence, token_id)

    def _append_token(self, sequence: Sequence, token_id: int, logprobs: Logprobs | None = None) -> bool:
        """Whether it goes on after that token."""
        sequence.append(token_id)
        self._waiting.charge(sequence, 1, GENERATED_WEIGHT)
        reason = sequence.finish_reason_after(token_id)
        event = TokenEvent(sequence.index, token_id, logprobs, reason)
        if reason is None:
            sequence.request.tell(event)
        else:
            self._finish(sequence, event)
        return reason is None

    def _finish_late(self, sequence: Sequence) -> bool:
        """End it if it had ended already, as is now known. Whether it had."""
        reason = sequence.late_finish_reason
        if reason is not None:
            self._finish(sequence, TokenEvent(sequence.index, finish_reason=reason))
        return reason is not None

    def _finish(self, sequence: Sequence, event: TokenEvent) -> None:
        if sequence in self._running:
            self._stop(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.request.finish(event)
