"""What is told of each adapter at this moment, put together from who names it, who holds it and where it is."""

import time
from collections.abc import Callable

from swaplora_adapters.registry.card import AdapterState, Card, Failure, Tier
from swaplora_adapters.registry.index import NamedVersions
from swaplora_adapters.registry.leases import LeaseCounts
from swaplora_adapters.registry.names import Names
from swaplora_adapters.registry.residency.host_tier import HostTier
from swaplora_adapters.registry.residency.residency import Residency
from swaplora_adapters.store.records import VersionRecord


class Cards:
    """`num_bytes` says what a version takes in memory."""

    def __init__(
        self,
        names: Names,
        lease_counts: LeaseCounts,
        residency: Residency,
        host: HostTier,
        num_bytes: Callable[[VersionRecord], int],
    ) -> None:
        self._names = names
        self._lease_counts = lease_counts
        self._residency = residency
        self._host = host
        self._num_bytes = num_bytes
        self._last_failure: dict[str, Failure] = {}

    def note_failure(self, name: str, reason: str) -> None:
        """Why the last attempt to replace `name` did not."""
        self._last_failure[name] = Failure(time.time(), reason)

    def forget_failure(self, name: str) -> None:
        self._last_failure.pop(name, None)

    def all(self) -> list[Card]:
        """In order of name."""
        return [self.of(named) for named in self._names.index.all()]

    def of(self, named: NamedVersions) -> Card:
        record = named.current
        state, reason = self._state_of(record)
        return Card(
            record,
            named.versions,
            state,
            reason,
            self._tier(record.digest, is_resident=state in {"resident", "draining"}),
            named.is_pinned,
            self._lease_counts.num_in_flight(record.name),
            self._lease_counts.last_used(record.name),
            self._last_failure.get(record.name),
            named.shared_with,
            named.gate is not None,
        )

    def failure(self, record: VersionRecord) -> str | None:
        """Why nobody can be answered by it, as far as that is known."""
        state, reason = self._state_of(record)
        return reason if state == "failed" else None

    def _state_of(self, record: VersionRecord) -> tuple[str, str | None]:
        return self._residency.state(record.digest) if record.failure is None else ("failed", record.failure)

    def states(self) -> list[AdapterState]:
        """Where each name's current version is, and how much it takes, in order of name."""
        resident, loading = self._residency.digests()
        return [self._state(named, resident, loading) for named in self._names.index.all()]

    def _state(self, named: NamedVersions, resident: frozenset[str], loading: frozenset[str]) -> AdapterState:
        record = named.current
        return AdapterState(
            record.name,
            self._num_bytes(record),
            self._tier(record.digest, is_resident=record.digest in resident),
            is_loading=record.digest in loading,
            is_pinned=named.is_pinned,
        )

    def _tier(self, digest: str, *, is_resident: bool) -> Tier:
        if is_resident:
            return "device"
        return "host" if digest in self._host else "disk"
