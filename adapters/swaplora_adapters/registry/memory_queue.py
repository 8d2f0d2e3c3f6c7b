"""Who has room in memory and who comes next: decisions alone, without threads, files or locks.

A claim is all that one request wants at once. It is let in when all of it is in memory or has room there, and until
then it holds nothing, so that no two can wait for each other. Claims stand in line in the order in which they asked:

1. Whoever can have what it lacks is let in, the first in line first. Room is what is free, and what is in memory, not
   pinned, and used by nobody; the least recently used goes first. What is in memory is shared with all who want it.
2. The first in line that lacks room is passed by those who do not, as long as that costs it nothing: requests that were
   let in before it asked are in its way, and it has to wait for their end in any case.
3. Once only such as passed it are in its way, and it has been first for PATIENCE_SECONDS, as few copies as will do are
   closed: those with the fewest users, the least recently used of them first. Who runs on a closed copy ends on it; new
   requests for it wait, and the room that the first in line needs is given to nobody else. All others go on as before.
4. Copies stay closed no longer than the claim had been first when they were closed. If that was in vain they are open
   again, all who waited for them are let in, and it begins anew: those who are let in by now are let end first.

From this follows, where no request holds its memory longer than L seconds:

- The first in line is let in within 4 · max(L, PATIENCE_SECONDS): whenever closing was in vain, it lasted less than L,
  and the next time it lasts at least twice as long. So nobody is passed over for ever.
- Nobody waits longer than `wait_seconds`: then, or at once if it could never be let in, a claim is without hope.
- Whoever wants only what others use, and what is not closed, is let in at once, whatever is in line. Nothing is closed
  for longer than half of `wait_seconds` at a time, and nothing while that would be in vain: while requests are in the
  way that were let in before the first in line asked.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from swaplora_adapters.registry.claim import Claim, Copy
from swaplora_adapters.weights.served import AdapterWeights

PATIENCE_SECONDS = 0.5


@dataclass(slots=True)
class Front:
    """The first in line, and what is done for it."""

    claim: Claim
    began_at: float
    let_end: float  # who was let in until then is let end before anything is closed
    closed: set[Copy] = field(default_factory=set)
    closed_until: float = math.inf

    @property
    def patience_ends_at(self) -> float:
        return self.began_at + PATIENCE_SECONDS

    def close(self, copies: Iterable[Copy], now: float) -> None:
        """Nobody else may have these, for as long as the claim has been first by the time of the first of them."""
        if not self.closed:
            self.closed_until = now + (now - self.began_at)
        self.closed.update(copies)

    def open(self, copies: Iterable[Copy]) -> None:
        """These are open again, or gone."""
        self.closed.difference_update(copies)
        if not self.closed:
            self.closed_until = math.inf

    def begin_anew(self, now: float) -> None:
        """What was closed was closed in vain."""
        self.open(tuple(self.closed))
        self.let_end = now


class Room:
    """Owns the budget and the line of who waits for a part of it. Not thread-safe; times are `time.monotonic()`'s."""

    def __init__(self, budget: int, wait_seconds: float) -> None:
        """`budget` is in bytes of weights."""
        self.budget = budget
        self.wait_seconds = wait_seconds
        self.pinned: dict[str, int] = {}
        self.kept: dict[str, int] = {}  # the pinned ones that are never evicted
        self._copies: OrderedDict[str, Copy] = OrderedDict()  # least recently used first
        self._line: list[Claim] = []  # in order of arrival
        self._front: Front | None = None

    @property
    def used_bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())

    @property
    def claims(self) -> list[Claim]:
        """All that wait, for room or for a load."""
        users = dict.fromkeys(claim for copy in self._copies.values() for claim in copy.users)
        return [*self._line, *(claim for claim in users if not claim.is_loaded)]

    def find(self, digest: str) -> Copy | None:
        return self._copies.get(digest)

    def waiting_for(self, digest: str) -> list[Claim]:
        """Those in line that want it, perhaps among others."""
        return [claim for claim in self._line if digest in claim.sizes]

    def is_draining(self, copy: Copy) -> bool:
        """Whether new requests for it wait until those that use it are done."""
        return copy.is_dropped or (self._front is not None and copy in self._front.closed)

    def add(self, claim: Claim) -> None:
        """Let it stand in line."""
        self._line.append(claim)
        for digest in claim.sizes.keys() & self._copies.keys():
            self._copies.move_to_end(digest)

    def pin(self, pinned: Mapping[str, int]) -> None:
        """Keep exactly these, digest → bytes, or as many as leave room for any single one of the others."""
        self.pinned = dict(pinned)
        fitting = {digest: nbytes for digest, nbytes in pinned.items() if nbytes <= self.budget}
        self.kept = fitting
        if sum(fitting.values()) > self.budget:
            self.kept = _first_that_fit(fitting, self.budget - max(fitting.values()))
        for digest in pinned.keys() & self._copies.keys():
            self._copies[digest].is_dropped = False  # there is one who wants it again
        if self._front is not None:  # what is kept from now on would never make room
            self._front.open([copy for copy in self._front.closed if copy.digest in self.kept])

    def next_in(self, now: float) -> Claim | None:
        """Let in whoever comes next, with copies that are in memory and others that have room to be loaded.

        None if nobody can be let in now.
        """
        front = self._review(now)
        if front is None:
            return None
        now_staying, still_staying = self._staying(), self._staying(front.closed)
        limit = max(0, self._excess(still_staying, front.claim))  # more than 0 if what it wants was lost meanwhile

        def can_come_in(claim: Claim) -> bool:
            if self._excess(now_staying, claim) > 0:
                return False
            if claim is front.claim or not front.closed:
                return True
            wants_closed = any(copy.digest in claim.sizes for copy in front.closed)
            return not wants_closed and self._excess(still_staying, claim, front.claim) <= limit

        claim = next(filter(can_come_in, self._line), None)
        if claim is not None:
            self._let_in(claim, now)
        return claim

    def next_hopeless(self, now: float) -> Claim | None:
        """One who has waited too long, or to whom what is kept leaves no room."""
        return next((claim for claim in self._line if self._is_hopeless(claim, now)), None)

    def seconds_to_wait(self, now: float) -> float | None:
        """After `next_in`: until time alone changes something. None for never."""
        if self._front is None:
            return None
        moments = (self._front.patience_ends_at, self._front.closed_until, self._gives_up_at(self._line[0]))
        return min((moment - now for moment in moments if moment > now), default=0.0)

    def leave(self, claim: Claim) -> bool:
        """Out of the line, or off its copies; whether it was there."""
        was_there = bool(claim.copies) or claim in self._line
        if claim in self._line:
            self._line.remove(claim)
        for copy in claim.copies:
            del copy.users[claim]
            self._free_if_dropped(copy)
        claim.copies = ()
        return was_there

    def loaded(self, copy: Copy, weights: AdapterWeights) -> None:
        """It is there, and may be smaller than was foreseen."""
        copy.weights = weights
        copy.nbytes = min(copy.nbytes, weights.nbytes)
        self._free_if_dropped(copy)

    def forget(self, copy: Copy) -> list[Claim]:
        """It is not loaded after all: it and all who wanted it leave; who that was."""
        users = list(copy.users)
        for claim in users:
            self.leave(claim)
        self._remove(copy)
        return users

    def drop(self, digest: str) -> None:
        """Out of memory at once, or when its last user is done."""
        copy = self.find(digest)
        if copy is not None:
            copy.is_dropped = True
            self._free_if_dropped(copy)

    def kept_besides(self, claim: Claim) -> int:
        """Bytes of what is never evicted for it."""
        return sum(nbytes for digest, nbytes in self.kept.items() if digest not in claim.sizes)

    def check_integrity(self) -> None:
        """Raise RuntimeError if the budget is exceeded, a count is off, or what was dropped stays for nobody."""
        if self.used_bytes > self.budget:
            raise RuntimeError("resident adapters exceed their budget")
        if any(copy.is_dropped and copy.is_idle for copy in self._copies.values()):
            raise RuntimeError("a dropped adapter is still in memory, and nobody uses it")
        if any(claim.copies for claim in self._line):
            raise RuntimeError("a request waits for memory and has some")
        for copy in self._copies.values():
            if any(copy not in claim.copies or len(claim.copies) != len(claim.sizes) for claim in copy.users):
                raise RuntimeError("a request has part of the memory that it wants")

    def _review(self, now: float) -> Front | None:
        """Who is first in line now, and what has to be done for it."""
        if not self._line:
            self._front = None
            return None
        if self._front is None or self._front.claim is not self._line[0]:
            self._front = Front(self._line[0], now, self._line[0].asked_at)
        if now >= self._front.closed_until:
            self._front.begin_anew(now)
        elif now >= self._front.patience_ends_at:
            self._close_for(self._front, now)
        return self._front

    def _close_for(self, front: Front, now: float) -> None:
        """Close as few copies as will do, if there are enough that only such use as passed the first in line."""
        staying = self._staying(front.closed)
        excess = self._excess(staying, front.claim)
        in_the_way = (self._copies[digest] for digest in self._copies if digest in staying)
        closable = [copy for copy in in_the_way if self._is_closable(copy, front)]
        if 0 < excess <= sum(copy.nbytes for copy in closable):
            closable.sort(key=lambda copy: len(copy.users))
            front.close(_as_few_as_will_do(closable, excess), now)

    def _is_closable(self, copy: Copy, front: Front) -> bool:
        is_spared = copy.digest in self.kept or copy.digest in front.claim.sizes
        return not is_spared and not copy.has_user_from(front.let_end)

    def _let_in(self, claim: Claim, now: float) -> None:
        """Give it what is in memory and room for the rest; evict the least recently used until the budget is kept."""
        self._line.remove(claim)
        claim.let_in_at = now
        lacking = {digest: nbytes for digest, nbytes in claim.sizes.items() if digest not in self._copies}
        excess = self.used_bytes + sum(lacking.values()) - self.budget
        for copy in [copy for copy in self._copies.values() if self._is_evictable(copy)]:
            if excess > 0 and copy.digest not in claim.sizes:
                self._remove(copy)
                excess -= copy.nbytes
        self._copies.update((digest, Copy(digest, nbytes)) for digest, nbytes in lacking.items())
        claim.copies = tuple(self._copies[digest] for digest in claim.sizes)
        for copy in claim.copies:
            copy.users[claim] = None
            copy.is_dropped = False  # who had it dropped did not know of this one

    def _staying(self, closed: Iterable[Copy] = ()) -> dict[str, int]:
        """Digest → bytes of what cannot be evicted now, or at least not when what is `closed` has come to its end."""
        ending = {copy.digest for copy in closed}
        copies = (copy for copy in self._copies.values() if not self._is_evictable(copy))
        return {copy.digest: copy.nbytes for copy in copies if copy.digest not in ending}

    def _is_evictable(self, copy: Copy) -> bool:
        return copy.is_idle and copy.digest not in self.kept

    def _excess(self, staying: Mapping[str, int], *claims: Claim) -> int:
        """Bytes beyond the budget, if what is `staying` and all that `claims` want were in memory together."""
        wanted = {digest: nbytes for claim in claims for digest, nbytes in claim.sizes.items() if digest not in staying}
        copies = {digest: self._copies[digest].nbytes for digest in wanted.keys() & self._copies.keys()}
        return sum(staying.values()) + sum((wanted | copies).values()) - self.budget

    def _free_if_dropped(self, copy: Copy) -> None:
        if copy.is_dropped and copy.is_idle:
            self._remove(copy)

    def _remove(self, copy: Copy) -> None:
        del self._copies[copy.digest]
        if self._front is not None:
            self._front.open([copy])

    def _gives_up_at(self, claim: Claim) -> float:
        return claim.asked_at + self.wait_seconds

    def _is_hopeless(self, claim: Claim, now: float) -> bool:
        return now >= self._gives_up_at(claim) or self.kept_besides(claim) + sum(claim.sizes.values()) > self.budget


def _as_few_as_will_do(copies: Iterable[Copy], nbytes: int) -> list[Copy]:
    """The first ones that have these bytes together, less those of them that are not needed for it."""
    chosen: list[Copy] = []
    for copy in copies:
        if nbytes > 0:
            chosen.append(copy)
            nbytes -= copy.nbytes
    for copy in list(chosen):
        if nbytes + copy.nbytes <= 0:
            chosen.remove(copy)
            nbytes += copy.nbytes
    return chosen


def _first_that_fit(sizes: Mapping[str, int], room: int) -> dict[str, int]:
    fitting: dict[str, int] = {}
    for digest, nbytes in sizes.items():
        if sum(fitting.values()) + nbytes <= room:
            fitting[digest] = nbytes
    return fitting
