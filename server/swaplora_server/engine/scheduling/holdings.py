"""Who holds how much of what there is, of those that run: places, or blocks of the KV cache. Imports no torch."""

from collections import defaultdict
from collections.abc import Callable, Collection

from swaplora_server.engine.request import Sequence

Standing = tuple[bool, int, int, int]


class Holdings:
    """How much each tenant, and each of its adapters, has of something that the sequences that run hold."""

    def __init__(self, running: Collection[Sequence], amount: Callable[[Sequence], int]) -> None:
        self._of_tenants: defaultdict[str, int] = defaultdict(int)
        self._of_lines: defaultdict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
        for sequence in running:
            request, held = sequence.request, amount(sequence)
            self._of_tenants[request.tenant] += held
            self._of_lines[request.tenant, request.digests] += held

    def of(self, sequence: Sequence) -> tuple[int, int]:
        """What its tenant has, and its adapter among the tenant's."""
        request = sequence.request
        return self._of_tenants[request.tenant], self._of_lines[request.tenant, request.digests]

    def is_behind(self, sequence: Sequence, other: Sequence, times: int = 1) -> bool:
        """Whether its tenant, or its adapter of the same tenant, has less than the other's, even with one more.

        With `times` the other's must have so many times that, at least.
        """
        is_own = sequence.request.tenant == other.request.tenant
        own, others = self.of(sequence)[is_own] + 1, self.of(other)[is_own]
        return own < others and own * times <= others


def standing(running: Collection[Sequence], *, is_scarce: bool) -> dict[Sequence, Standing]:
    """The greatest is the first to give its blocks back, where these are scarce.

    That is the youngest of whoever holds most of them, tenant and then adapter; the oldest of all is spared.
    """
    oldest = min((sequence.arrival for sequence in running), default=0)
    if not is_scarce:
        return {sequence: (sequence.arrival > oldest, 0, 0, sequence.arrival) for sequence in running}
    blocks = Holdings(running, lambda sequence: len(sequence.block_table))
    return {sequence: (sequence.arrival > oldest, *blocks.of(sequence), sequence.arrival) for sequence in running}


class Places:
    """The places of those that run, and who may have to give one up to another whose like have fewer.

    That is nobody who began in this step, or who lost its place before and has not computed its prompt again since:
    each comes to a next token, however many others come meanwhile.
    """

    def __init__(self, running: Collection[Sequence], step: int) -> None:
        self._held = Holdings(running, lambda _sequence: 1)
        self._lines: defaultdict[tuple[str, tuple[str, ...]], list[Sequence]] = defaultdict(list)
        self._most_of: dict[str, Sequence] = {}  # of each tenant, one of its adapter that has most
        may_give = [other for other in running if other.begun_in != step and not other.is_recomputed]
        for other in sorted(may_give, key=self._held.of):
            self._lines[other.request.tenant, other.request.digests].append(other)
            self._most_of[other.request.tenant] = other
        self._most = max(self._most_of.values(), key=self._held.of, default=None)

    def givers(self, waiting: Sequence, times: int = 1) -> list[Sequence]:
        """Those of whoever has most, tenant and then adapter; else those of its own tenant's adapter that has most.

        None where those like the one that waits are not behind, so many times.
        """
        for most in (self._most, self._most_of.get(waiting.request.tenant)):
            if most is not None and self._held.is_behind(waiting, most, times):
                return self._lines[most.request.tenant, most.request.digests]
        return []


def least_computed(givers: Collection[Sequence]) -> Sequence:
    """The one that loses least with its place; of several the youngest."""
    return min(givers, key=lambda other: (other.num_computed, -other.arrival))
