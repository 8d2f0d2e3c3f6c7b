"""A request's hold on a version, and a version's way out once nobody holds it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from swaplora_adapters.artifact.records import VersionRecord
from swaplora_adapters.artifact.served import AdapterWeights


class Lease:
    """One request's hold on one version, from admission to its end. Give it back exactly once."""

    def __init__(
        self, record: VersionRecord, weights: Future[AdapterWeights], give_back: Callable[["Lease"], None]
    ) -> None:
        self.record = record
        self.weights = weights  # fails with the reason when the version cannot be loaded
        self._give_back = give_back
        self._is_released = False

    def release(self) -> None:
        """Raises RuntimeError the second time: a count that is off would free weights under somebody."""
        if self._is_released:
            raise RuntimeError("a lease was given back twice")
        self._is_released = True
        self._give_back(self)


class Removal:
    """Versions on their way out: gone for new requests, in memory until the last lease on them is back."""

    def __init__(self, records: Sequence[VersionRecord]) -> None:
        self.records = tuple(records)
        self.digests = {record.digest for record in records}
        self.freed: Future[None] = Future()  # done when memory and files are free, or belong to another name as well
