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


def who_gives_place(running: Collection[Sequence], waiting: Sequence, times: int = 1) -> Sequence | None:
    """Of whoever has most places, tenant and then adapter, the one of which least is computed.

    None where those like the one that waits are not behind.
    """
    places = Holdings(running, lambda _sequence: 1)
    most = max(running, key=places.of, default=None)
    if most is None or not places.is_behind(waiting, most, times):
        return None
    held = places.of(most)
    return min(
        (other for other in running if places.of(other) == held), key=lambda other: (other.num_computed, -other.arrival)
    )
