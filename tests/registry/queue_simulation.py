"""A memory queue with a clock of its own: whole traffics of requests in no time, and what each may expect."""

from collections.abc import Iterable, Mapping, Set
from types import SimpleNamespace

from swaplora_adapters.registry.residency import memory_queue
from swaplora_adapters.registry.residency.claims import Claim, Resident
from swaplora_adapters.registry.residency.memory_queue import MemoryQueue
from swaplora_adapters.weights.served import AdapterWeights


class QueueSimulation:
    """Asks, loads and ends as it is told, and sees to the line whenever something or the time has changed it.

    Keeps its own books of who holds what, and checks the queue against them after every change.
    """

    def __init__(self, budget: int, wait_seconds: float = 30.0) -> None:
        self.now = 0.0
        self.queue = MemoryQueue(budget, wait_seconds)
        self.waiting: list[Claim] = []  # in order of arrival
        self.inside: list[Claim] = []
        self.refused: list[Claim] = []
        self.kept_in_memory: set[str] = set()
        self.being_loaded: set[Resident] = set()
        self.first_since: tuple[Claim | None, float] = (None, 0.0)
        self.longest_first = 0.0  # seconds that any claim was first in line
        self.draining_since: dict[str, float] = {}
        self.draining_before: set[str] = set()

    def ask(self, sizes: Mapping[str, int], tenant: str = "") -> Claim:
        claim = Claim(sizes, self.now, tenant)
        self.waiting.append(claim)
        self.queue.add(claim)
        if any(other.tenant != tenant for other in self.waiting):  # they take turns, as the tests of that say
            self.waiting = list(self.queue._line)  # noqa: SLF001
        self.settle()
        return claim

    def leave(self, claim: Claim) -> None:
        """It has ended, or its client has gone."""
        assert self.queue.leave(claim)
        self.waiting = [other for other in self.waiting if other is not claim]
        self.inside = [other for other in self.inside if other is not claim]
        self.settle()

    def load(self, resident: Resident) -> None:
        self.being_loaded.discard(resident)
        self.queue.loaded(resident, _weights(resident.nbytes))
        self.settle()

    def fail(self, resident: Resident) -> list[Claim]:
        """It cannot be loaded; who is told so."""
        self.being_loaded.discard(resident)
        told = self.queue.forget(resident)
        assert {claim for claim in self.inside if resident.digest in claim.sizes} == set(told)
        self.inside = [claim for claim in self.inside if resident.digest not in claim.sizes]
        self.settle()
        return told

    def pin(self, pinned: Mapping[str, int]) -> None:
        self.kept_in_memory.clear()
        self.queue.pin(pinned)
        self.settle()

    def drop(self, digest: str) -> None:
        """What is deleted is no longer pinned by then."""
        self.pin({pinned: nbytes for pinned, nbytes in self.queue.pinned.items() if pinned != digest})
        self.queue.drop(digest)
        self.settle()

    def pass_time(self, seconds: float) -> None:
        """Stop at every moment that the queue wants to be asked again."""
        until = self.now + seconds
        while (wait := self.queue.seconds_to_wait(self.now)) is not None and self.now + wait <= until:
            self.now += wait
            self.settle()
        self.now = until
        self.settle()

    @property
    def residents(self) -> dict[str, Resident]:
        """All in memory."""
        return {resident.digest: resident for resident in self.queue._residents.values()}  # noqa: SLF001

    @property
    def loading(self) -> list[Resident]:
        return [resident for resident in self.residents.values() if resident.weights is None]

    @property
    def draining(self) -> set[str]:
        head = self.queue._head  # noqa: SLF001
        return set() if head is None else {resident.digest for resident in head.draining}

    def settle(self) -> None:
        while True:
            draining, promised = self.draining, self.is_promised()
            if (claim := self.queue.next_admitted(self.now)) is not None:
                is_first = claim is self.waiting[0]
                self.waiting.remove(claim)
                self.inside.append(claim)
                assert [resident.digest for resident in claim.residents] == list(claim.sizes), "has a part"
                if promised and not is_first and self.draining == draining:
                    assert self.is_promised(), "let in at the cost of the first in line"
            elif (claim := self.queue.next_refused(self.now)) is not None:
                assert self.is_hopeless(claim), "refused without need"
                self.queue.leave(claim)
                self.waiting.remove(claim)
                self.refused.append(claim)
            else:
                break
        self.check()

    def is_hopeless(self, claim: Claim) -> bool:
        kept = sum(nbytes for digest, nbytes in self.queue.kept.items() if digest not in claim.sizes)
        never_fits = kept + sum(claim.sizes.values()) > self.queue.budget
        return never_fits or self.now >= claim.asked_at + self.queue.wait_seconds

    def check(self) -> None:
        """All that must hold at any time for any traffic."""
        self.queue.check_integrity()
        self._check_memory()
        self._check_nobody_waits_in_vain()
        self._check_the_first()
        self._check_what_is_closed()

    def _check_memory(self) -> None:
        residents = self.residents
        assert sum(resident.nbytes for resident in residents.values()) <= self.queue.budget
        for claim in self.inside:
            assert claim.sizes.keys() <= residents.keys(), "taken from who uses it"
        assert self.being_loaded <= set(residents.values()), "taken while it is loaded"
        self.being_loaded = set(self.loading)
        assert self.kept_in_memory <= residents.keys(), "evicted in spite of its pin"
        self.kept_in_memory = {
            digest for digest in self.queue.kept if digest in residents and residents[digest].weights
        }

    def _check_nobody_waits_in_vain(self) -> None:
        for claim in self.waiting:
            assert not self.is_hopeless(claim), "waits without hope"
            assert self.draining or not self.fits(claim), "has room, and waits"
            assert claim.sizes.keys() & self.draining or self.the_first_would_lack(claim), "could pass, and waits"
            is_shared = all(digest in self.residents and self.residents[digest].users for digest in claim.sizes)
            assert claim.sizes.keys() & self.draining or not is_shared, "wants what others use, and waits"
        if self.waiting:
            assert not self.fits(self.waiting[0]), "is first and has room, and waits"

    def fits(self, claim: Claim) -> bool:
        return self.bytes_staying(set(), [claim]) <= self.queue.budget

    def is_promised(self) -> bool:
        """Whether residents drain, and the first in line has room when those have come to their end."""
        return bool(self.draining) and self.bytes_staying(self.draining, self.waiting[:1]) <= self.queue.budget

    def the_first_would_lack(self, claim: Claim) -> bool:
        """Whether there is no room for this now, or for the first in line once what drains has ended."""
        return not self.fits(claim) or self.bytes_staying(self.draining, [claim, self.waiting[0]]) > self.queue.budget

    def bytes_staying(self, besides: Set[str], claims: Iterable[Claim]) -> int:
        """Of what is used, loading or kept, but for `besides`, and of what `claims` want."""
        used = {digest for claim in self.inside for digest in claim.sizes}
        residents = self.residents
        staying = [
            c for c in residents.values() if c.weights is None or c.digest in used or c.digest in self.queue.kept
        ]
        sizes = {resident.digest: resident.nbytes for resident in staying if resident.digest not in besides}
        for claim in claims:
            for digest, nbytes in claim.sizes.items():
                sizes.setdefault(digest, residents[digest].nbytes if digest in residents else nbytes)
        return sum(sizes.values())

    def _check_the_first(self) -> None:
        first, (before, since) = (self.waiting[0] if self.waiting else None), self.first_since
        if before is not None:
            self.longest_first = max(self.longest_first, self.now - since)
        if before is not first:
            self.first_since = (first, self.now)

    def _check_what_is_closed(self) -> None:
        """Not for too long, as little as will do, and nothing while one is in the way who has to be waited for."""
        first, since = self.first_since
        draining = self.draining
        assert not draining or first is not None, "drained for nobody"
        if first is None:
            self.draining_since.clear()
            self.draining_before = set()
            return
        self.draining_since = {
            digest: self.draining_since.get(digest, self.now) for digest in draining if self.residents[digest].weights
        }
        if draining and not draining <= self.draining_before:
            for digest in draining:
                assert self.bytes_staying(draining - {digest}, [first]) > self.queue.budget, "drained without need"
        self.draining_before = draining
        if self.draining_since:
            assert self.now - min(self.draining_since.values()) <= self.queue.wait_seconds / 2
            assert min(self.draining_since.values()) - since >= memory_queue.PATIENCE_SECONDS
            assert self.now - min(self.draining_since.values()) <= min(self.draining_since.values()) - since
        assert not draining & (first.sizes.keys() | self.queue.kept.keys())
        for digest in draining:
            users = [claim for claim in self.inside if digest in claim.sizes]
            assert all(claim.admitted_at > first.asked_at for claim in users), "drained in vain"


def _weights(nbytes: int) -> AdapterWeights:
    return SimpleNamespace(nbytes=nbytes)  # type: ignore[return-value]  # nobody computes with them
