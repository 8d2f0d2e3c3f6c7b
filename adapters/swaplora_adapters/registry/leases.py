"""A request's hold on a version, and a version's way out once nobody holds it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from swaplora_adapters.registry.claim import Claim
from swaplora_adapters.store.records import VersionRecord
from swaplora_adapters.weights.served import AdapterWeights


class Lease:
    """One request's hold on one version, from admission to its end: files and identity. Give it back exactly once."""

    def __init__(self, record: VersionRecord, give_back: Callable[["Lease"], None]) -> None:
        self.record = record
        self._give_back = give_back
        self._is_released = False

    def release(self) -> None:
        """Raises RuntimeError the second time: a count that is off would free weights under somebody."""
        if self._is_released:
            raise RuntimeError("a lease was given back twice")
        self._is_released = True
        self._give_back(self)


class Tenancy:
    """What one request holds: its leases, and memory for the weights of all of them at once, or none yet."""

    def __init__(self, leases: Sequence[Lease], claim: Claim, free: Callable[[Claim], None]) -> None:
        self.leases = tuple(leases)
        self._claim = claim
        self._free = free

    @property
    def weights(self) -> Future[Mapping[str, AdapterWeights]]:
        """By digest, when all are in memory; fails with the reason when one cannot be."""
        return self._claim.weights

    @property
    def at_fault(self) -> Lease | None:
        """The one that `weights` failed for, if it was a single one."""
        return next((lease for lease in self.leases if lease.record.digest == self._claim.at_fault), None)

    def release(self) -> None:
        """Give back everything, memory first. Raises RuntimeError the second time."""
        self._free(self._claim)
        for lease in self.leases:
            lease.release()


class Removal:
    """Versions on their way out: gone for new requests, in memory until the last lease on them is back."""

    def __init__(self, records: Sequence[VersionRecord]) -> None:
        self.records = tuple(records)
        self.digests = {record.digest for record in records}
        self.freed: Future[None] = Future()  # done when memory and files are free, or belong to another name as well
