"""How many ranks the adapters of a step have together, and whether one more adapter may join. Imports no torch."""

from collections.abc import Mapping


class StepRanks:
    """The adapters of the sequences that run, by digest, and the sum of their ranks against `limit`.

    What adapters add to a step grows with the sum of their ranks, each counted once however many rows it has: a step
    reads every one of its adapters whole. Rows of the base, and of adapters in the step already, add nothing.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_users: dict[str, int] = {}
        self.total = 0

    def copy(self) -> "StepRanks":
        copied = StepRanks(self._limit)
        copied._num_users, copied.total = dict(self._num_users), self.total
        return copied

    def fits(self, ranks: Mapping[str, int]) -> bool:
        """Whether these adapters, rank by digest, may join. One that is too large by itself may run alone."""
        added = sum(rank for digest, rank in ranks.items() if digest not in self._num_users)
        return not added or not self.total or self.total + added <= self._limit

    def add(self, ranks: Mapping[str, int]) -> None:
        """Count in one sequence with these adapters, until `remove`."""
        for digest, rank in ranks.items():
            if digest not in self._num_users:
                self.total += rank
            self._num_users[digest] = self._num_users.get(digest, 0) + 1

    def remove(self, ranks: Mapping[str, int]) -> None:
        """Count out what `add` counted in. Raises KeyError for an adapter that it did not."""
        for digest, rank in ranks.items():
            self._num_users[digest] -= 1
            if not self._num_users[digest]:
                del self._num_users[digest]
                self.total -= rank
