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
            self._of_lines[request.line] += held

    def of(self, sequence: Sequence) -> tuple[int, int]:
        """What its tenant has, and its adapter among the tenant's."""
        request = sequence.request
        return self._of_tenants[request.tenant], self._of_lines[request.line]

    def is_behind(self, sequence: Sequence, other: Sequence, times: int = 1, more: int = 1) -> bool:
        """Whether its tenant, or its adapter of the same tenant, has less than the other's, even with so many `more`.

        With `times` the other's must have so many times that, at least.
        """
        is_own = sequence.request.tenant == other.request.tenant
        own, others = self.of(sequence)[is_own] + more, self.of(other)[is_own]
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
