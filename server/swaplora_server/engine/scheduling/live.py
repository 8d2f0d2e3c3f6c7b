"""The sequences that are here: those that run, with all that they hold, and those that wait. Imports no torch."""

from collections.abc import Iterator

from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.prefix_cache import PrefixCache
from swaplora_server.engine.request import LAST_PRIORITY, Request, Sequence, TokenEvent
from swaplora_server.engine.scheduling.giving_way import GivingWay
from swaplora_server.engine.scheduling.step_ranks import StepRanks
from swaplora_server.engine.scheduling.waiting_line import WaitingLine


class Live:
    """Whoever runs holds blocks of the pool and has its adapters' ranks counted; whoever waits holds nothing."""

    def __init__(
        self, pool: BlockPool, *, max_num_seqs: int, max_batch_tokens: int, max_step_ranks: int, prefix_cache: bool
    ) -> None:
        self.pool = pool
        self.cache = PrefixCache(pool, is_on=prefix_cache)
        self.ranks = StepRanks(max_step_ranks)
        self.ranks_but_last = StepRanks(max_step_ranks)  # of those that run, without the last priority
        self.waiting = WaitingLine()
        self.running: dict[Sequence, None] = {}  # in the order in which they began
        self.giving_way = GivingWay(
            self.running,
            pool,
            self.ranks,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            has_cache=prefix_cache,
        )
        self.num_preempted = 0  # sequences that gave their blocks back; only grows, any thread may read it

    def __iter__(self) -> Iterator[Sequence]:
        """All that are here now, whoever ends meanwhile."""
        return iter([*self.running, *self.waiting])

    def of(self, request: Request) -> list[Sequence]:
        """Those of `request` that have not ended."""
        return [sequence for sequence in self if sequence.request is request]

    def add(self, sequence: Sequence) -> None:
        """One that waits."""
        self.waiting.add(sequence)
        self.giving_way.forget()

    def begin(self, sequence: Sequence, found: list[int]) -> None:
        """Let one that waits run, from the end of the blocks that were found for it."""
        self.waiting.remove(sequence)
        self.running[sequence] = None
        self.giving_way.forget()
        self.ranks.add(sequence.request.adapter_ranks)
        if sequence.priority != LAST_PRIORITY:
            self.ranks_but_last.add(sequence.request.adapter_ranks)
        self.cache.begin(sequence, found)

    def preempt(self, sequence: Sequence) -> None:
        """Have one that runs give its blocks back, and wait."""
        self._stop(sequence)
        self.waiting.add(sequence)
        sequence.was_preempted = True
        self.num_preempted += 1

    def finish(self, sequence: Sequence, event: TokenEvent) -> None:
        """It has ended, as its request is told."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.request.finish(event)

    def finish_late(self, sequence: Sequence) -> bool:
        """End it if it had ended already, as is now known. Whether it had."""
        reason = sequence.late_finish_reason
        if reason is not None:
            self.finish(sequence, TokenEvent(sequence.index, finish_reason=reason))
        return reason is not None

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the pool is whole and held by exactly the running sequences."""
        self.pool.check_integrity(sequence.block_table for sequence in self.running)
        if any(sequence.block_table for sequence in self.waiting):
            raise RuntimeError("blocks are held by a sequence that does not run")
        ranks = {digest: rank for sequence in self.running for digest, rank in sequence.request.adapter_ranks.items()}
        if self.ranks.total != sum(ranks.values()):
            raise RuntimeError("the ranks that are counted are not those of the adapters that run")

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence out of those that run, and its blocks from it."""
        del self.running[sequence]
        self.giving_way.forget()
        self.ranks.remove(sequence.request.adapter_ranks)
        if sequence.priority != LAST_PRIORITY:
            self.ranks_but_last.remove(sequence.request.adapter_ranks)
        self.cache.end(sequence)
