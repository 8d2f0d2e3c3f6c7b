"""Who of those that run gives way to one that waits, so that it has a place, blocks and ranks. Imports no torch.

Nobody does unless the other begins in the same step. Who gives way is of those that have most, tenant and then adapter;
of these the ones of which least is computed, and no more of them than it takes. Nobody does to one of its own tenant
of which the priority comes later, nor anybody to one of the last priority, which evaluations have: such a one gives way
before all others, and to all others, whatever it has. Who else gave way before is spared until it has come to a next
token, and to as many as make up for what it would compute again; the oldest of all keeps its blocks. Of the tokens that
steps have room for, a quarter is computed again at most.
"""

from collections.abc import Collection

from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import LAST_PRIORITY, Sequence
from swaplora_server.engine.scheduling.holdings import Holdings
from swaplora_server.engine.scheduling.step_ranks import StepRanks

STEPS_BETWEEN = 2  # those in which somebody gives way
SHARE_COMPUTED_AGAIN = 4  # of so many tokens that steps have room for, one
STEPS_IN_VAIN = 8  # until it is asked again whether somebody has more, if nobody comes, begins or ends
AGAIN_PER_TOKEN = 8  # computed by one that gives way over and over, for each token that it comes to in between


class Room:
    """What is left beside those that run and one that waits, if some gave way. Less than none of it is not enough."""

    def __init__(self, num_places: int, num_blocks: int, ranks: StepRanks, waiting: Sequence) -> None:
        self.num_places, self.num_blocks = num_places, num_blocks
        self._ranks = ranks
        self._waiting = waiting

    @property
    def has_ranks(self) -> bool:
        return self._ranks.fits(self._waiting.request.adapter_ranks)

    @property
    def is_enough(self) -> bool:
        return self.num_places >= 0 and self.num_blocks >= 0 and self.has_ranks

    def gain(self, giver: Sequence, num_blocks: int) -> None:
        """What `giver` has."""
        self.num_places += 1
        self.num_blocks += num_blocks
        self._ranks.remove(giver.request.adapter_ranks)

    def can_lose(self, giver: Sequence, num_blocks: int) -> bool:
        """Let `giver` keep what `gain` gained, if there is enough without it."""
        self.num_places -= 1
        self.num_blocks -= num_blocks
        self._ranks.add(giver.request.adapter_ranks)
        if not self.is_enough:
            self.gain(giver, num_blocks)
            return False
        return True


class GivingWay:
    """What those that run hold, and who of them gives it up. What it has counted holds until `forget` is called."""

    def __init__(
        self,
        running: Collection[Sequence],
        pool: BlockPool,
        ranks: StepRanks,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        has_cache: bool,
    ) -> None:
        """The first three are those of the scheduler, which changes them."""
        self._running = running
        self._pool = pool
        self._ranks = ranks
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._has_cache = has_cache
        self._step = 0
        self._next_in = 0  # the step from which on somebody may give way again
        self._vain_until = 0  # the step from which on those that wait may be behind
        self._counted: dict[bool, Holdings] = {}  # places, and blocks where these are scarce

    def forget(self) -> None:
        """Somebody has come, begun or ended."""
        self._counted.clear()
        self._vain_until = 0

    def begin_step(self, step: int, *, is_stalled: bool) -> bool:
        """Whether somebody may give way in it, and it is worth asking who."""
        self._step = step
        self._counted.clear()  # of blocks they have come to hold more
        return step >= self._next_in and (is_stalled or step >= self._vain_until)

    def givers(self, waiting: Sequence, found: Collection[int], times: int, before: int) -> list[Sequence]:
        """Those that give way in this step to `waiting`, which lacks something and shares the blocks that were `found`.

        None if it could not begin all the same. Only those do that began up to the step `before`, and whose like have
        as many `times` what its own would have.
        """
        num_places = self._max_num_seqs - len(self._running) - 1
        num_blocks = self._pool.num_free - len(self._running) - waiting.num_lacking
        room = Room(num_places, num_blocks, self._ranks.copy(), waiting)
        lacks_blocks = num_blocks < 0
        oldest = min(other.arrival for other in self._running) if lacks_blocks else None
        gains: dict[Sequence, int] = {}
        behind = self._in_turn(waiting, times, lacks_blocks, lacks_else=num_places < 0 or not room.has_ranks)
        for other in behind:
            is_last = _is_last_beside(other, waiting) and other.begun_in != self._step
            if is_last or (other.arrival != oldest and self._may_give(other, before, lacks_blocks)):
                gains[other] = 1 + self._pool.num_released(other.block_table, found) if lacks_blocks else 0
                room.gain(other, gains[other])
                if room.is_enough:
                    givers = [giver for giver, gain in gains.items() if not room.can_lose(giver, gain)]
                    self._note(givers, lacks_blocks)
                    return givers
        if behind or self._vain_until != self._step + 1:
            self._vain_until = self._step + (1 if behind else STEPS_IN_VAIN)
        return []

    def _in_turn(self, waiting: Sequence, times: int, lacks_blocks: bool, lacks_else: bool) -> list[Sequence]:
        """Those that are to give way before others, as long as there is not enough."""
        held = self._held(lacks_blocks)
        is_behind: dict[tuple[str, tuple[str, ...]], bool] = {}
        for other in self._running:
            line = other.request.line
            if line not in is_behind:
                is_behind[line] = (not lacks_blocks or held.is_behind(waiting, other, times, waiting.num_lacking)) and (
                    not lacks_else or self._held(of_blocks=False).is_behind(waiting, other, times)
                )
        last = [other for other in self._running if _is_last_beside(other, waiting)]
        others = (other for other in self._running if not _is_last_beside(other, waiting))
        behind = [other for other in others if is_behind[other.request.line] and _goes_after(other, waiting)]
        behind.sort(key=lambda other: (*(-of for of in held.of(other)), other.num_computed, -other.arrival))
        return sorted(last, key=lambda other: other.num_computed) + behind

    def _held(self, of_blocks: bool) -> Holdings:
        if of_blocks not in self._counted:
            amount = (lambda other: len(other.block_table)) if of_blocks else (lambda _other: 1)
            self._counted[of_blocks] = Holdings(self._running, amount)
        return self._counted[of_blocks]

    def _may_give(self, other: Sequence, before: int, loses_blocks: bool) -> bool:
        if other.begun_in is None or other.begun_in > before or other.is_recomputed:
            return False
        num_again = self._num_computed_again(other, loses_blocks)
        return not other.was_preempted or AGAIN_PER_TOKEN * other.num_tokens_since >= num_again

    def _num_computed_again(self, giver: Sequence, loses_blocks: bool) -> int:
        """How many of its tokens, once it goes on: what is in blocks that nobody needs is found in the cache."""
        is_found = self._has_cache and not loses_blocks
        return giver.num_computed % self._pool.block_size if is_found else giver.num_computed

    def _note(self, givers: Collection[Sequence], lost_blocks: bool) -> None:
        """What the last priority computes again is of its own share."""
        others = [giver for giver in givers if giver.priority != LAST_PRIORITY]
        num_again = sum(self._num_computed_again(giver, lost_blocks) for giver in others)
        self._next_in = self._step + max(STEPS_BETWEEN, -(-SHARE_COMPUTED_AGAIN * num_again // self._max_batch_tokens))


def _goes_after(other: Sequence, waiting: Sequence) -> bool:
    """Whether priorities let `other` give way: they count within a tenant, and the last one is behind all others'."""
    is_own = waiting.request.tenant == other.request.tenant
    return other.priority >= waiting.priority or not (is_own or waiting.priority == LAST_PRIORITY)


def _is_last_beside(other: Sequence, waiting: Sequence) -> bool:
    return other.priority == LAST_PRIORITY != waiting.priority
