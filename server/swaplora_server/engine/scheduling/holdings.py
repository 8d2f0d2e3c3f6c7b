"""Who holds how much of what there is, of those that run: places, or blocks of the KV cache. Imports no torch."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable

from swaplora_server.engine.request import Sequence


class Holdings:
    """How much each tenant, and each of its adapters, has of something that the sequences that run hold."""

    def __init__(self, running: Iterable[Sequence], amount: Callable[[Sequence], int]) -> None:
        self._amounts: Counter[Hashable] = Counter()
        for sequence in running:
            self._amounts.update(dict.fromkeys(_sharers(sequence), amount(sequence)))

    def of(self, sequence: Sequence) -> tuple[int, int]:
        """What its tenant has, and its adapter among the tenant's."""
        tenant, line = _sharers(sequence)
        return self._amounts[tenant], self._amounts[line]

    def is_behind(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether its tenant, or its adapter of the same tenant, has less even when one goes from the other to it."""
        is_own = sequence.request.tenant == other.request.tenant
        return self.of(sequence)[is_own] + 1 < self.of(other)[is_own]


def _sharers(sequence: Sequence) -> tuple[Hashable, Hashable]:
    request = sequence.request
    return request.tenant, (request.tenant, request.digests)
