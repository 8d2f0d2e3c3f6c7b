"""What is kept for those that cannot begin yet, and who may begin before them all the same. Imports no torch.

It is kept for the first that lacks blocks, and for the first that waits for ranks and was passed over for long. Those
alone pass it that fit beside it and all that began since then, as long as they may get: so it begins at the latest when
all that ran before have ended, however many others come. What is kept for one of the last priority others of it leave
alone, and nobody else. No more than a number of those that lack blocks are looked at
in a step, of one line and of all, and of lines that lack ranks, of one tenant and of all: however many wait, a step is
no longer for it.
"""

from collections import Counter
from collections.abc import Collection

from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import LAST_PRIORITY, Sequence
from swaplora_server.engine.scheduling.step_ranks import StepRanks
from swaplora_server.engine.scheduling.waiting_line import Line

MAX_LACKING, MAX_LACKING_OF_LINE = 64, 8  # blocks, of those that are looked at in a step
MAX_LACKING_RANKS, MAX_LACKING_RANKS_OF_TENANT = 64, 16


class Kept:
    """For one step, in which some begin."""

    def __init__(self, step: int, running: Collection[Sequence], pool: BlockPool, max_step_ranks: int) -> None:
        """`running` is the scheduler's, which changes it."""
        self._step = step
        self._running = running
        self._pool = pool
        self._max_step_ranks = max_step_ranks
        self._ranks_since = StepRanks(max_step_ranks)
        self._has_ranks_for: Sequence | None = None
        self._has_blocks_for: Sequence | None = None
        self._num_lacking: Counter[Line] = Counter()  # blocks, of those that were looked at
        self._num_lacking_ranks: Counter[str] = Counter()  # the same, by tenant
        self._num_blocks_since = 0  # that those may come to hold, and one more for each

    def keep_blocks(self, waiting: Sequence) -> None:
        """For one that lacks them, unless they are kept for another no less urgent."""
        lacking_since = self._note_lack(waiting)
        if _is_kept_from(waiting, self._has_blocks_for):
            return
        self._has_blocks_for = waiting
        self._num_blocks_since = self._pool.blocks_for(waiting.num_tokens) + 1
        for sequence in self._begun_since(lacking_since):
            self._num_blocks_since += self._most_blocks(sequence) + 1

    def keep_ranks(self, waiting: Sequence, since: int) -> None:
        """For one that lacks them, from the step `since` on; unless they are kept for another no less urgent."""
        if _is_kept_from(waiting, self._has_ranks_for):
            return
        self._has_ranks_for = waiting
        self._ranks_since = StepRanks(self._max_step_ranks)
        for sequence in self._begun_since(since):
            self._ranks_since.add(sequence.request.adapter_ranks)

    def note(self, begun: Sequence) -> None:
        """Somebody has begun."""
        if self._has_ranks_for is not None:
            self._ranks_since.add(begun.request.adapter_ranks)
        self._num_blocks_since += self._most_blocks(begun) + 1

    def leaves_ranks(self, sequence: Sequence) -> bool:
        """Whether there are as many as are kept if `sequence` begins."""
        if self._has_ranks_for is None or not _is_kept_from(sequence, self._has_ranks_for):
            return True
        ranks = sequence.request.adapter_ranks
        self._ranks_since.add(ranks)
        has_ranks = self._ranks_since.fits(self._has_ranks_for.request.adapter_ranks)
        self._ranks_since.remove(ranks)
        return has_ranks

    def leaves_blocks(self, sequence: Sequence) -> bool:
        """The same. One that was found to take more of them than there are is not looked at again."""
        if not _is_kept_from(sequence, self._has_blocks_for):
            return True
        num_blocks = self._num_blocks_since + self._most_blocks(sequence)
        is_known_to_lack = sequence.num_lacking + len(self._running) > self._pool.num_free
        if is_known_to_lack or num_blocks > self._pool.num_blocks:
            self._note_lack(sequence)
            return False
        return True

    def has_looked_enough(self, line: Line | None = None) -> bool:
        """Whether so many of a line lack blocks, or of all, that nobody else of them is looked at."""
        if line is None:
            return self._num_lacking.total() >= MAX_LACKING
        return self._num_lacking[line] >= MAX_LACKING_OF_LINE

    def lacks_ranks(self, sequence: Sequence) -> bool:
        """Note that it does. Whether so many of its tenant do that nobody else of it is looked at in its turn."""
        tenant = sequence.request.tenant
        self._num_lacking_ranks[tenant] += 1
        return self._num_lacking_ranks[tenant] >= MAX_LACKING_RANKS_OF_TENANT

    @property
    def has_looked_enough_for_ranks(self) -> bool:
        """The same of all tenants."""
        return self._num_lacking_ranks.total() >= MAX_LACKING_RANKS

    @property
    def is_leaving_out(self) -> bool:
        """Whether there may be some that lack no ranks, and have not been looked at for those that do."""
        most = max(self._num_lacking_ranks.values(), default=0)
        return self.has_looked_enough_for_ranks or most >= MAX_LACKING_RANKS_OF_TENANT

    def _note_lack(self, sequence: Sequence) -> int:
        """Since when it has lacked blocks, now at the latest."""
        self._num_lacking[sequence.request.line] += 1
        if sequence.lacking_since is None:
            sequence.lacking_since = self._step
        return sequence.lacking_since

    def _begun_since(self, step: int) -> list[Sequence]:
        return [sequence for sequence in self._running if (sequence.begun_in or 0) >= step]

    def _most_blocks(self, sequence: Sequence) -> int:
        return self._pool.blocks_for(sequence.max_num_tokens)


def _is_kept_from(sequence: Sequence, kept_for: Sequence | None) -> bool:
    """Whether `sequence` has to leave what is kept for another."""
    return kept_for is not None and (kept_for.priority != LAST_PRIORITY or sequence.priority == LAST_PRIORITY)
