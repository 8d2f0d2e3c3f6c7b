"""Who has room in memory and who is admitted next: decisions alone, without threads, files or locks.

A claim is all that one request wants at once. It is admitted when all of it is in memory or has room there, and until
then it holds nothing, so that no two can wait for each other. Claims stand in line by turns of the tenants, of each in
the order in which they asked: one more turn for each claim of the same tenant before it, be it in line or lately
admitted with something to load. Nobody comes before the first in line:

1. Whoever can have what it lacks is admitted, the first in line first. Room is what is free, and what is in memory, not
   pinned, and used by nobody; the least recently used goes first. What is in memory is shared with all who want it.
2. The first in line that lacks room is passed by those who do not, as long as that costs it nothing: requests that were
   admitted before it asked are in its way, and it has to wait for their end in any case.
3. Once only such as passed it are in its way, and it has been first for PATIENCE_SECONDS, as few residents as will do
   are drained: those with the fewest users, the least recently used of them first. Who runs on a draining one ends on
   it; new requests for it wait, and the room that the first in line needs is given to nobody else. All others go on
   as before.
4. Residents drain no longer than the claim had been first when that began. If it was in vain they are open again, all
   who waited for them are admitted, and it begins anew: those who are admitted by now are let end first.

From this follows, where no request holds its memory longer than L seconds:

- The first in line is admitted within 4 · max(L, PATIENCE_SECONDS): whenever draining was in vain, it lasted less than
  L, and the next time it lasts at least twice as long. So nobody is passed over for ever.
- Nobody waits longer than `wait_seconds`: then, or at once if it could never be admitted, a claim is refused.
- Whoever wants only what others use, and what does not drain, is admitted at once, whatever is in line. Nothing
  drains for longer than half of `wait_seconds` at a time, and nothing while that would be in vain: while requests are
  in the way that were admitted before the first in line asked.
"""

import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from swaplora_adapters.registry.residency.claims import Claim, Resident
from swaplora_adapters.weights.served import AdapterWeights

PATIENCE_SECONDS = 0.5


@dataclass(slots=True)
class QueueHead:
    """The first in line, and what is done for it."""

    claim: Claim
    began_at: float
    spared_until: float  # who was admitted until then is let end before anything is drained
    draining: set[Resident] = field(default_factory=set)
    draining_until: float = math.inf

    @property
    def patience_ends_at(self) -> float:
        return self.began_at + PATIENCE_SECONDS

    def drain(self, residents: Iterable[Resident], now: float) -> None:
        """Nobody else may have these, for as long as the claim has been first by the time of the first of them."""
        if not self.draining:
            self.draining_until = now + (now - self.began_at)
        self.draining.update(residents)

    def stop_draining(self, residents: Iterable[Resident]) -> None:
        """These are open again, or gone."""
        self.draining.difference_update(residents)
        if not self.draining:
            self.draining_until = math.inf

    def begin_anew(self, now: float) -> None:
        """What was drained was drained in vain."""
        self.stop_draining(tuple(self.draining))
        self.spared_until = now


class MemoryQueue:
    """Owns the budget and the line of who waits for a part of it. Not thread-safe; times are `time.monotonic()`'s."""

    def __init__(
        self, budget: int, wait_seconds: float, on_evict: Callable[[str], None] = lambda _digest: None
    ) -> None:
        """`budget` is in bytes of weights; `on_evict` is told which digest gave its room to another."""
        self.budget = budget
        self.wait_seconds = wait_seconds
        self._on_evict = on_evict
        self.pinned: dict[str, int] = {}
        self.kept: dict[str, int] = {}  # the pinned ones that are never evicted
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._line: list[Claim] = []
        self._last_turns: dict[str, int] = {}  # by tenant: of its last claim that was admitted with something to load
        self._head: QueueHead | None = None

    @property
    def used_bytes(self) -> int:
        return sum(resident.nbytes for resident in self._residents.values())

    @property
    def line(self) -> list[Claim]:
        """All that wait for room, the first of them first."""
        return list(self._line)

    @property
    def claims(self) -> list[Claim]:
        """All that wait, for room or for a load."""
        users = dict.fromkeys(claim for resident in self._residents.values() for claim in resident.users)
        return [*self._line, *(claim for claim in users if not claim.is_loaded)]

    @property
    def resident_digests(self) -> frozenset[str]:
        """Of what is in memory."""
        return frozenset(digest for digest, resident in self._residents.items() if resident.weights is not None)

    @property
    def awaited_digests(self) -> frozenset[str]:
        """Of what is wanted and not in memory."""
        wanted = {digest for claim in self._line for digest in claim.sizes} | self._residents.keys()
        return frozenset(wanted - self.resident_digests)

    def find(self, digest: str) -> Resident | None:
        return self._residents.get(digest)

    def waiting_for(self, digest: str) -> list[Claim]:
        """Those in line that want it, perhaps among others."""
        return [claim for claim in self._line if digest in claim.sizes]

    def is_draining(self, resident: Resident) -> bool:
        """Whether new requests for it wait until those that use it are done."""
        return resident.is_dropped or (self._head is not None and resident in self._head.draining)

    def add(self, claim: Claim) -> None:
        """Let it stand in line."""
        claim.turn = self._next_turn(claim.tenant)
        insort(self._line, claim, lo=1, key=lambda other: other.turn)
        for digest in claim.sizes.keys() & self._residents.keys():
            self._residents.move_to_end(digest)

    def _next_turn(self, tenant: str) -> int:
        """No lower than that of the first in line: time in which one asked for nothing is no credit."""
        if not self._line:
            self._last_turns.clear()
            return 0
        own = [claim.turn for claim in self._line if claim.tenant == tenant]
        return max(self._line[0].turn, 1 + max([*own, self._last_turns.get(tenant, -1)]))

    def pin(self, pinned: Mapping[str, int]) -> None:
        """Keep exactly these, digest → bytes, or as many as leave room for any single one of the others."""
        self.pinned = dict(pinned)
        fitting = {
            digest: self._weights_size(digest, pinned[digest]) for digest in pinned if pinned[digest] <= self.budget
        }
        self.kept = fitting
        if sum(fitting.values()) > self.budget:
            self.kept = _first_that_fit(fitting, self.budget - max(fitting.values()))
        for digest in pinned.keys() & self._residents.keys():
            self._residents[digest].is_dropped = False  # there is one who wants it again
        if self._head is not None:  # what is kept from now on would never make room
            self._head.stop_draining([resident for resident in self._head.draining if resident.digest in self.kept])

    def next_admitted(self, now: float) -> Claim | None:
        """Admit whoever comes next, with residents that are in memory and others that have room to be loaded.

        None if nobody can be admitted now.
        """
        head = self._review(now)
        if head is None:
            return None
        now_staying, still_staying = self._staying(), self._staying(head.draining)
        limit = max(0, self._excess(still_staying, head.claim))  # more than 0 if what it wants was lost meanwhile

        def can_come_in(claim: Claim) -> bool:
            if self._excess(now_staying, claim) > 0:
                return False
            if claim is head.claim or not head.draining:
                return True
            wants_draining = any(resident.digest in claim.sizes for resident in head.draining)
            return not wants_draining and self._excess(still_staying, claim, head.claim) <= limit

        claim = next(filter(can_come_in, self._line), None)
        if claim is not None:
            self._admit(claim, now)
        return claim

    def next_refused(self, now: float) -> Claim | None:
        """One who has waited too long, or to whom what is kept leaves no room."""
        return next((claim for claim in self._line if self._is_refused(claim, now)), None)

    def seconds_to_wait(self, now: float) -> float | None:
        """After `next_admitted`: until time alone changes something. None for never."""
        if self._head is None:
            return None
        moments = (self._head.patience_ends_at, self._head.draining_until, self._gives_up_at(self._line[0]))
        return min((moment - now for moment in moments if moment > now), default=0.0)

    def leave(self, claim: Claim) -> bool:
        """Out of the line, or off its residents; whether it was there."""
        was_there = bool(claim.residents) or claim in self._line
        if claim in self._line:
            self._line.remove(claim)
        for resident in claim.residents:
            del resident.users[claim]
            self._free_if_dropped(resident)
        claim.residents = ()
        return was_there

    def loaded(self, resident: Resident, weights: AdapterWeights) -> None:
        """It is there, and may be smaller than was foreseen."""
        resident.weights = weights
        resident.size = min(resident.size, weights.nbytes)
        self._free_if_dropped(resident)

    def forget(self, resident: Resident) -> list[Claim]:
        """It is not loaded after all: it and all who wanted it leave; who that was."""
        users = list(resident.users)
        for claim in users:
            self.leave(claim)
        self._remove(resident)
        return users

    def drop(self, digest: str) -> None:
        """Out of memory at once, or when its last user is done."""
        resident = self.find(digest)
        if resident is not None:
            resident.is_dropped = True
            self._free_if_dropped(resident)

    def kept_besides(self, claim: Claim) -> int:
        """Bytes of what is never evicted for it: weights, not what was made of them, which goes once they are idle."""
        others = self.kept.keys() - claim.sizes.keys()
        return sum(self._weights_size(digest, self.kept[digest]) for digest in others)

    def check_integrity(self) -> None:
        """Raise RuntimeError if the budget is exceeded, a count is off, or what was dropped stays for nobody."""
        if self.used_bytes > self.budget:
            raise RuntimeError("resident adapters exceed their budget")
        if any(resident.is_dropped and resident.is_idle for resident in self._residents.values()):
            raise RuntimeError("a dropped adapter is still in memory, and nobody uses it")
        if any(claim.residents for claim in self._line):
            raise RuntimeError("a request waits for memory and has some")
        for resident in self._residents.values():
            if any(
                resident not in claim.residents or len(claim.residents) != len(claim.sizes) for claim in resident.users
            ):
                raise RuntimeError("a request has part of the memory that it wants")

    def _review(self, now: float) -> QueueHead | None:
        """Who is first in line now, and what has to be done for it."""
        if not self._line:
            self._head = None
            return None
        if self._head is None or self._head.claim is not self._line[0]:
            self._head = QueueHead(self._line[0], now, self._line[0].asked_at)
        if now >= self._head.draining_until:
            self._head.begin_anew(now)
        elif now >= self._head.patience_ends_at:
            self._drain_for(self._head, now)
        return self._head

    def _drain_for(self, head: QueueHead, now: float) -> None:
        """Drain as few residents as will do, if there are enough that only such use as passed the first in line."""
        staying = self._staying(head.draining)
        excess = self._excess(staying, head.claim)
        in_the_way = (self._residents[digest] for digest in self._residents if digest in staying)
        drainable = [resident for resident in in_the_way if self._is_drainable(resident, head)]
        if 0 < excess <= sum(resident.nbytes for resident in drainable):
            drainable.sort(key=lambda resident: len(resident.users))
            head.drain(_as_few_as_will_do(drainable, excess), now)

    def _is_drainable(self, resident: Resident, head: QueueHead) -> bool:
        is_spared = resident.digest in self.kept or resident.digest in head.claim.sizes
        return not is_spared and not resident.has_user_admitted_by(head.spared_until)

    def _admit(self, claim: Claim, now: float) -> None:
        """Give it what is in memory and room for the rest; evict the least recently used until the budget is kept."""
        self._line.remove(claim)
        claim.admitted_at = now
        lacking = {digest: nbytes for digest, nbytes in claim.sizes.items() if digest not in self._residents}
        if lacking:
            self._last_turns[claim.tenant] = claim.turn
        excess = self._excess({digest: each.nbytes for digest, each in self._residents.items()}, claim)
        for resident in [resident for resident in self._residents.values() if self._is_evictable(resident)]:
            if excess > 0 and resident.digest not in claim.sizes:
                self._remove(resident)
                self._on_evict(resident.digest)
                excess -= resident.nbytes
        for resident in self._residents.values():
            unwanted = resident.beside - claim.beside.get(resident.digest, 0)
            if excess > 0 and resident.is_idle and unwanted > 0:
                resident.let_go_beside()
                excess -= unwanted
        self._residents.update((digest, Resident(digest, nbytes)) for digest, nbytes in lacking.items())
        claim.residents = tuple(self._residents[digest] for digest in claim.sizes)
        for resident in claim.residents:
            resident.users[claim] = None
            resident.beside = max(resident.beside, claim.beside.get(resident.digest, 0))
            resident.is_dropped = False  # who had it dropped did not know of this one

    def _staying(self, draining: Iterable[Resident] = ()) -> dict[str, int]:
        """Digest → bytes of what cannot be evicted now, or at least not when what is `draining` has come to its end."""
        ending = {resident.digest for resident in draining}
        residents = (resident for resident in self._residents.values() if not self._is_evictable(resident))
        held = ((each.digest, each.size + each.beside_in_use) for each in residents)
        return {digest: nbytes for digest, nbytes in held if digest not in ending}

    def _is_evictable(self, resident: Resident) -> bool:
        return resident.is_idle and resident.digest not in self.kept

    def _excess(self, staying: Mapping[str, int], *claims: Claim) -> int:
        """Bytes beyond the budget, if what is `staying` and all that `claims` want were in memory together."""
        held = dict(staying)
        for claim in claims:
            for digest, nbytes in claim.sizes.items():
                held[digest] = max(held.get(digest, 0), self._size(digest, nbytes, claim.beside.get(digest, 0)))
        return sum(held.values()) - self.budget

    def _size(self, digest: str, nbytes: int, beside: int = 0) -> int:
        """What it takes, or would take, if so much were made of its weights; `nbytes` are foreseen for these."""
        resident = self._residents.get(digest)
        return nbytes + beside if resident is None else resident.size + max(resident.beside_in_use, beside)

    def _weights_size(self, digest: str, nbytes: int) -> int:
        resident = self._residents.get(digest)
        return nbytes if resident is None else resident.size

    def _free_if_dropped(self, resident: Resident) -> None:
        if resident.is_dropped and resident.is_idle:
            self._remove(resident)

    def _remove(self, resident: Resident) -> None:
        del self._residents[resident.digest]
        if self._head is not None:
            self._head.stop_draining([resident])

    def _gives_up_at(self, claim: Claim) -> float:
        return claim.asked_at + self.wait_seconds

    def _is_refused(self, claim: Claim, now: float) -> bool:
        return now >= self._gives_up_at(claim) or self.kept_besides(claim) + claim.nbytes > self.budget


def _as_few_as_will_do(residents: Iterable[Resident], nbytes: int) -> list[Resident]:
    """The first ones that have these bytes together, less those of them that are not needed for it."""
    chosen: list[Resident] = []
    for resident in residents:
        if nbytes > 0:
            chosen.append(resident)
            nbytes -= resident.nbytes
    for resident in list(chosen):
        if nbytes + resident.nbytes <= 0:
            chosen.remove(resident)
            nbytes += resident.nbytes
    return chosen


def _first_that_fit(sizes: Mapping[str, int], room: int) -> dict[str, int]:
    fitting: dict[str, int] = {}
    for digest, nbytes in sizes.items():
        if sum(fitting.values()) + nbytes <= room:
            fitting[digest] = nbytes
    return fitting
