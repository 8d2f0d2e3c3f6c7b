"""Continuous batching: who runs in the next step, and what becomes of its tokens. Pure decisions: imports no torch.

Scheduling is iteration-level (Orca): sequences join and leave between any two steps. Decoding sequences come first, one
row each; what is left of the token budget goes to prefill, in chunks (chunked prefill), in order of arrival. A prompt
that would take all of it leaves half to those who wait. What the prefix cache holds of a prompt is not computed again.
When KV blocks run out, the youngest running sequence of whoever holds most of them is preempted: it gives its blocks
back and is recomputed later, but for what the cache then still holds. The oldest of all is spared, so that something
always comes to its end. Sequences also give way (giving_way.py) to one that waits for a place or for blocks, and whose
like have less than half as many, or fewer where nobody who waits has begun for long: who asks for little begins within
a few steps, however long the answers of those who have all.

Waiting sequences begin in the order of the waiting line. One lets later ones go before it while its adapters do not fit
beside those that run, and while another sequence is computing the very block it needs next, which it then shares. It
does so for a bounded number of steps. Then those alone pass it that fit beside it, as those do that pass one that lacks
blocks: it begins at the latest when all that ran before it have ended. Those who hold it up for its ranks, and have run
for as long themselves, give way to it as well, if they are of who has more.

What fails while one sequence is looked at ends its request, and that alone.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile

import structlog

from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import (
    LAST_PRIORITY,
    OVERDUE,
    OVERDUE_CODE,
    FinishReason,
    Request,
    Sequence,
    TokenEvent,
)
from swaplora_server.engine.sampling.constraint import UnmetConstraintError
from swaplora_server.engine.scheduling.background import Background
from swaplora_server.engine.scheduling.batch import Batch, Sampled, ScheduledRows, StepRoom
from swaplora_server.engine.scheduling.holdings import Standing, standing
from swaplora_server.engine.scheduling.kept import Kept
from swaplora_server.engine.scheduling.live import Live
from swaplora_server.engine.scheduling.outcomes import Outcomes
from swaplora_server.engine.scheduling.waiting_line import PROMPT_WEIGHT, Line, Over

_log = structlog.get_logger(__name__)
MAX_STEPS_PASSED_OVER = 64  # some seconds; then nothing begins before the one that waits
MAX_ASKING = 16  # of those that wait, for somebody to give way to them, in a step
FAR_BEHIND = 2  # times as much as the like of one who waits would have: then it need not wait until that gets free


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
        self._live = live = Live(
            pool,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            max_step_ranks=max_step_ranks,
            prefix_cache=prefix_cache,
        )
        self.cache, self._ranks, self._giving_way = live.cache, live.ranks, live.giving_way
        self._running, self._waiting = live.running, live.waiting
        self._outcomes = Outcomes(live, appends_forced=appends_forced)
        self._max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs
        self._max_scored_rows = max_scored_rows
        self._takes_whole = takes_whole
        self._max_step_ranks = max_step_ranks
        self.num_failed = 0  # requests that `fail` ended; only grows, any thread may read it
        self._num_steps = 0
        self._last_begun_in = 0  # the step in which anybody did, or nobody waited
        self._ranks_due_in = 0  # the step from which on ranks are kept for those that were passed over for long
        self._next_deadline = math.inf  # of those that are here, or were
        self.background = Background()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_preempted(self) -> int:
        """Sequences that gave their blocks back; only grows, any thread may read it."""
        return self._live.num_preempted

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
            self._live.add(Sequence(request, index))
        self._next_deadline = min(self._next_deadline, request.deadline or math.inf)

    def schedule(self) -> Batch:
        """Choose the next step's rows and give them blocks."""
        self._num_steps += 1
        now = time.monotonic()
        self._end_overdue(now)
        num_last = self.background.num_rows(now, self._running, self._max_batch_tokens)
        room = StepRoom(self._max_batch_tokens, self._max_scored_rows, num_last, self._takes_whole)
        chosen: list[ScheduledRows] = []
        order = self._standing()
        for sequence in sorted(self._running, key=lambda sequence: (sequence.num_uncomputed > 1, order[sequence])):
            try:
                self._live.finish_late(sequence)
                rows = None if sequence.is_held else room.take(sequence, leaves_half=len(self._waiting) > 0)
                if rows and sequence in self._running and self._make_room(rows, chosen, order):
                    chosen.append(rows)
                    room.count(rows)
            except Exception as error:  # noqa: BLE001 - one request's boundary
                self.fail(sequence.request, error)
        chosen += self._admit(room, chosen)
        chosen = [rows for rows in chosen if rows.sequence.block_table]  # a sibling may have failed since
        chosen = [self._with_rest(rows, room) for rows in chosen]
        self.background.note(chosen)
        return Batch(tuple(sorted(chosen, key=lambda rows: (rows.sequence.request.adapter_key, rows.sequence.arrival))))

    def commit(self, batch: Batch, outputs: Iterable[Sampled]) -> None:
        """Record that `batch` ran: advance every sequence, append what was sampled, finish what ended."""
        of_asking = iter(outputs)
        for rows in batch.rows:
            sampled = next(of_asking) if rows.num_heads else None
            try:
                self._outcomes.commit(rows, sampled)
            except Exception as error:  # noqa: BLE001 - one request's boundary
                self.fail(rows.sequence.request, error)

    def abort(self, request: Request, index: int | None = None) -> None:
        """End the request's unfinished sequences, or the one at `index`, and free what they hold."""
        for sequence in self._live.of(request):
            if index in (None, sequence.index):
                self._live.finish(sequence, TokenEvent(sequence.index, finish_reason=FinishReason.ABORT))

    def fail(self, request: Request, error: Exception) -> None:
        """End what is unfinished of the one request that `error` is the fault of. The log is told what it was."""
        self.num_failed += 1
        if isinstance(error, UnmetConstraintError):
            _log.info("a request asked for what cannot be", request=request.request_id, reason=str(error))
            message, code = str(error), "invalid_request"
        else:
            _log.error("a request failed alone", request=request.request_id, error=repr(error), exc_info=error)
            message, code = "the server failed on this request; its log says more", "internal_error"
        for sequence in self._live.of(request):
            self._live.finish(sequence, TokenEvent(sequence.index, None, None, FinishReason.ERROR, message, code))

    def fail_all(self, message: str, code: str) -> None:
        """End everything with an error: the engine cannot go on."""
        for sequence in self._live:
            self._live.finish(sequence, TokenEvent(sequence.index, None, None, FinishReason.ERROR, message, code))

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the pool is whole and held by exactly the running sequences."""
        self._live.check_integrity()

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
        for sequence in self._live:
            deadline = sequence.request.deadline or math.inf
            if deadline <= now:
                overdue = TokenEvent(sequence.index, None, None, FinishReason.ERROR, OVERDUE, OVERDUE_CODE)
                self._live.finish(sequence, overdue)
            else:
                self._next_deadline = min(self._next_deadline, deadline)

    def _admit(self, room: StepRoom, chosen: list[ScheduledRows]) -> list[ScheduledRows]:
        """Begin waiting sequences while they fit, in their order but for those that can let others go first.

        Rows of `chosen` give their room back where their sequence gives way.
        """
        begun: list[ScheduledRows] = []
        kept = Kept(self._num_steps, self._running, self.pool, self._max_step_ranks)
        is_stalled = self._num_steps - self._last_begun_in >= MAX_STEPS_PASSED_OVER
        may_give = self._giving_way.begin_step(self._num_steps, is_stalled=is_stalled)
        over: set[Line | str] = set()  # those of which nobody can begin
        num_asking = 0
        for sequence in self._turns(over, kept) if self._has_place or may_give else ():
            if not room.num_rows or kept.has_looked_enough() or not (self._has_place or may_give):
                break
            line = sequence.request.line
            try:
                if sequence.num_generated and (self._live.finish_late(sequence) or sequence.is_held):
                    continue
                if not kept.leaves_ranks(sequence) or self._should_wait_for_ranks(sequence, may_give=may_give):
                    over.add(line)
                    if kept.lacks_ranks(sequence):
                        over.add(sequence.request.tenant)
                    continue
                if not kept.leaves_blocks(sequence):
                    if kept.has_looked_enough(line):
                        over.add(line)
                    continue
                if self._should_wait_for_cache(sequence):
                    continue
                found = self.cache.find(sequence)
                if not self._can_begin(sequence, found):
                    givers = self._givers(sequence, found, is_stalled) if may_give else []
                    may_give &= not givers and (num_asking := num_asking + 1) < MAX_ASKING
                    if not givers and self._has_place:
                        self._keep(sequence, kept)
                        if kept.has_looked_enough(line):
                            over.add(line)
                        continue
                    if not givers:
                        over.add(line)
                        continue
                    for giver in givers:
                        self._give_way(giver, room, chosen)
                kept.note(sequence)
                begun += self._begin(sequence, found, room)
            except Exception as error:  # noqa: BLE001 - one request's boundary
                self.fail(sequence.request, error)
        if is_stalled:
            self._last_begun_in = self._num_steps
        return begun

    def _turns(self, over: Over, kept: Kept) -> Iterator[Sequence]:
        """Those that wait, in their order; after so many that lack ranks, those alone that need no more than run."""
        yield from takewhile(lambda _sequence: not kept.has_looked_enough_for_ranks, self._waiting.turns(over))
        if kept.is_leaving_out:
            digests = {digest for sequence in self._running for digest in sequence.request.digests}
            yield from self._waiting.turns_beside(digests, over)

    @property
    def _has_place(self) -> bool:
        """Whether one more may run, and has a block to begin with."""
        return len(self._running) < self._max_num_seqs and len(self._running) < self.pool.num_free

    def _should_wait_for_ranks(self, sequence: Sequence, *, may_give: bool) -> bool:
        """Whether its adapters do not fit beside those that run: not for long, since somebody last had to make room.

        It need not wait where those of the last priority alone are in its way, and may give way.
        """
        if self._has_ranks(sequence):
            return False
        sequence.has_lacked_ranks = True
        is_passed_over = self._is_passed_over(sequence)
        if may_give and sequence.priority != LAST_PRIORITY:
            is_held_up = not self._live.ranks_but_last.fits(sequence.request.adapter_ranks)
            return is_held_up and (is_passed_over or self._num_steps < self._ranks_due_in)
        return is_passed_over or self._num_steps < self._ranks_due_in

    def _should_wait_for_cache(self, sequence: Sequence) -> bool:
        """Whether its next block will soon be there to share."""
        return not self._is_overdue(sequence) and (
            self.cache.is_worth_waiting(sequence) and self._is_passed_over(sequence)
        )

    def _is_passed_over(self, sequence: Sequence) -> bool:
        """Whether later ones may go before it, if they can: for a number of steps from now on."""
        if sequence.passed_over_since is None:
            sequence.passed_over_since = self._num_steps
        return not self._is_overdue(sequence)

    def _is_overdue(self, sequence: Sequence) -> bool:
        since = sequence.passed_over_since
        return since is not None and self._num_steps - since >= MAX_STEPS_PASSED_OVER

    def _can_begin(self, sequence: Sequence, found: list[int]) -> bool:
        """Whether its whole prompt fits and leaves each running sequence a block, lest one be preempted at once."""
        sequence.num_lacking = self.pool.num_taken(found, sequence.num_tokens)
        return self._has_place and self._has_blocks(sequence) and self._has_ranks(sequence)

    def _has_blocks(self, sequence: Sequence) -> bool:
        return sequence.num_lacking + len(self._running) <= self.pool.num_free

    def _has_ranks(self, sequence: Sequence) -> bool:
        return self._ranks.fits(sequence.request.adapter_ranks)

    def _givers(self, sequence: Sequence, found: list[int], is_stalled: bool) -> list[Sequence]:
        """Who gives way to one that waits; to one that lacks ranks, those that have run for long."""
        has_ranks = self._has_ranks(sequence)
        times = FAR_BEHIND if has_ranks and not is_stalled else 1
        num_steps = 1 if has_ranks else MAX_STEPS_PASSED_OVER
        return self._giving_way.givers(sequence, found, times, self._num_steps - num_steps)

    def _give_way(self, giver: Sequence, room: StepRoom, chosen: list[ScheduledRows]) -> None:
        self._live.preempt(giver)
        for rows in [rows for rows in chosen if rows.sequence is giver]:
            chosen.remove(rows)
            room.take_back(rows)

    def _keep(self, sequence: Sequence, kept: Kept) -> None:
        """Let those alone go before it that do not hold it up."""
        if not self._has_blocks(sequence):
            kept.keep_blocks(sequence)
        if not self._has_ranks(sequence):
            overdue_since = (sequence.passed_over_since or 0) + MAX_STEPS_PASSED_OVER
            kept.keep_ranks(sequence, max(overdue_since, self._ranks_due_in))

    def _begin(self, sequence: Sequence, found: list[int], room: StepRoom) -> list[ScheduledRows]:
        """Let a sequence that fits run from the end of the blocks that were found for it.

        It has no rows yet where the step scores as many as it may.
        """
        if sequence.has_lacked_ranks and self._is_overdue(sequence):
            self._ranks_due_in = self._num_steps + MAX_STEPS_PASSED_OVER
        self._live.begin(sequence, found)
        if sequence.begun_in is None:  # who was preempted has paid
            self._waiting.charge(sequence, sequence.num_uncomputed, PROMPT_WEIGHT)
        sequence.begun_in = self._last_begun_in = self._num_steps
        sequence.num_tokens_before = sequence.num_tokens
        sequence.passed_over_since = sequence.lacking_since = None
        sequence.has_lacked_ranks = False
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

    def _make_room(self, rows: ScheduledRows, chosen: list[ScheduledRows], order: Mapping[Sequence, Standing]) -> bool:
        """Grow a sequence for its next rows, preempting others; False when it was its own turn to be."""
        sequence = rows.sequence
        while not self.pool.can_grow(sequence.block_table, rows.stop):
            scheduled = {id(rows.sequence) for rows in chosen}
            victim = max((other for other in self._running if id(other) not in scheduled), key=order.__getitem__)
            self._live.preempt(victim)
            if victim is sequence:
                return False
        self.pool.grow(sequence.block_table, rows.stop)
        return True
