"""Who is called what, and who holds what. A name is bound to one immutable version when a request is admitted.

Replace and delete act on names at once, and on versions when the last lease on them is back. Requests look only at
memory: `_changes` serialises what touches the disk, and `_lock`, which leases take, is never held across it.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from swaplora_adapters.artifact.disk import open_regular
from swaplora_adapters.artifact.intake import inspect_files
from swaplora_adapters.artifact.names import CONFIG_FILE, WEIGHTS_FILE, validate_name
from swaplora_adapters.artifact.records import VersionRecord
from swaplora_adapters.artifact.spec import MAX_CONFIG_BYTES
from swaplora_adapters.artifact.staging import Part, Staging
from swaplora_adapters.artifact.store import Store
from swaplora_adapters.artifact.weights import AdapterWeights, LinearShape, load_weights
from swaplora_adapters.errors import AdapterNotFoundError, InvalidAdapterError, InvalidAdapterNameError
from swaplora_adapters.registry.index import Index, NamedVersions
from swaplora_adapters.registry.lease import Lease, Removal
from swaplora_adapters.registry.residency import Residency

_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Card:
    """What is known of an adapter, as of now."""

    record: VersionRecord
    versions: Sequence[VersionRecord]
    state: str
    reason: str | None
    num_in_flight: int
    last_used: float | None


class Put(NamedTuple):
    """An upload's outcome."""

    card: Card
    is_first: bool  # of its name


class Registry:
    """Owns names, leases and, through the residency, the weights in memory. Thread-safe."""

    def __init__(
        self,
        store: Store,
        *,
        shapes: Mapping[str, LinearShape],
        dtype: torch.dtype,
        device: torch.device,
        memory_budget: int,
        keep_versions: int,
        base_model: str,
    ) -> None:
        """`shapes` are the base's linears that adapters may target; weights are kept in `dtype` on `device`.

        `base_model` is the base's name: an adapter that was made for another one is taken with a warning.
        """
        self._store = store
        self._shapes = shapes
        self._dtype = dtype
        self._device = device
        self._keep_versions = keep_versions
        self._base_model = base_model
        self._residency = Residency(self._load, memory_budget)
        self._index = Index()
        self._changes = threading.Lock()
        self._lock = threading.Lock()
        self._in_flight: Counter[str] = Counter()  # leases by name
        self._holders: Counter[str] = Counter()  # leases by digest
        self._last_used: dict[str, float] = {}
        self._removals: list[Removal] = []
        self._cleaner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-free")
        for name in store.names():
            self._refresh(name)
        if base_model in store.names():
            raise InvalidAdapterNameError(
                f"an adapter is stored as {base_model}, which is what the base is called; choose a --served-model-name"
            )

    def resolve(self, reference: str) -> VersionRecord:
        """See `Index.resolve`."""
        return self._index.resolve(reference)

    def lease(self, reference: str) -> Lease:
        """Bind `reference` to a version now, and have its weights loaded if they are not in memory."""
        with self._lock:
            record = self._index.resolve(reference)
            weights = self._residency.retain(record.digest, record.num_parameters * self._dtype.itemsize)
            self._in_flight[record.name] += 1
            self._holders[record.digest] += 1
            self._last_used[record.name] = time.time()
            return Lease(record, weights, self._give_back)

    def stage(self) -> Staging:
        """A folder to write an upload into."""
        return self._store.stage()

    def put(
        self, name: str, staging: Staging, *, source: str, if_match: str | None = None, if_none_match: bool = False
    ) -> Put:
        """Check staged files whole and make them the current version of `name`, durably.

        Raises InvalidAdapterError with every reason, AdapterTooLargeError, PreconditionFailedError, StorageFullError.
        """
        if name == self._base_model:
            raise InvalidAdapterNameError(f"{name} is what the base is called; choose another name")
        details = inspect_files(
            staging.config_path, staging.weights_path, self._shapes, self._dtype, base_model=self._base_model
        ).details
        self._residency.check_size(details.num_parameters * self._dtype.itemsize)
        with self._changes:
            published = self._store.publish(
                name, staging, details, source=source, if_match=if_match, if_none_match=if_none_match
            )
            self._residency.forget_failure(details.digest)  # its file may have been damaged, and is whole again
            self._refresh(name)
            for record in self._index.get(name).versions[: -self._keep_versions]:
                if record.version != published.record.version:
                    self._remove(name, record.version)
            return Put(self.card(name), is_first=published.previous is None)

    def put_folder(self, name: str, folder: Path) -> Put:
        """Take in an adapter from a folder of the operator's, as if it had been uploaded."""
        validate_name(name)
        with self._store.stage() as staging:
            try:
                _copy(folder / CONFIG_FILE, staging, "config", MAX_CONFIG_BYTES)
                _copy(folder / WEIGHTS_FILE, staging, "weights", 1 << 62)
                return self.put(name, staging, source=f"folder:{folder.name}")
            except InvalidAdapterError as error:
                raise type(error)([f"adapter {name}: {reason}" for reason in error.reasons]) from error

    def delete(self, name: str, version: int | None = None) -> Removal:
        """Remove a name, or one version of it, for new requests now; running ones end on what they hold.

        Raises AdapterNotFoundError and VersionNotFoundError.
        """
        with self._changes:
            return self._remove(name, version)

    def current_versions(self) -> list[VersionRecord]:
        """What each name stands for, in order of name."""
        return [named.current for named in self._index.all()]

    def cards(self) -> list[Card]:
        """Every adapter, in order of name."""
        return [self._card(named) for named in self._index.all()]

    def card(self, name: str) -> Card:
        """Raises AdapterNotFoundError."""
        return self._card(self._index.get(name))

    def _card(self, named: NamedVersions) -> Card:
        record = named.current
        state, reason = self._residency.state(record.digest)
        if record.failure is not None:
            state, reason = "failed", record.failure
        in_flight, last_used = self._in_flight[record.name], self._last_used.get(record.name)
        return Card(record, named.versions, state, reason, in_flight, last_used)

    @property
    def resident_bytes(self) -> int:
        return self._residency.resident_bytes

    def check_integrity(self) -> None:
        """Raise RuntimeError if counts are off, or if with no lease out something still waits to be freed."""
        with self._lock:
            self._residency.check_integrity()
            if self._in_flight.total() != self._holders.total():
                raise RuntimeError("leases by name and by digest differ")
        self._cleaner.submit(self._finish_removals).result()
        if not self._holders and self._removals:
            raise RuntimeError("no lease is out, and a removal still waits")

    def close(self) -> None:
        self._cleaner.shutdown()
        self._residency.close()
        self._store.close()

    def _give_back(self, lease: Lease) -> None:
        """Called by a lease, once, on the thread its request ended on; what touches the disk is the cleaner's."""
        with self._lock:
            self._residency.release(lease.record.digest, lease.weights)
            _count_down(self._in_flight, lease.record.name)
            _count_down(self._holders, lease.record.digest)
            if any(lease.record.digest in removal.digests for removal in self._removals):
                self._cleaner.submit(self._finish_removals)

    def _load(self, digest: str) -> AdapterWeights:
        self._store.verify(digest)
        paths = self._store.blob_paths(digest)
        return load_weights(digest, paths.config, paths.weights, self._shapes, self._dtype, self._device)

    def _remove(self, name: str, version: int | None) -> Removal:
        """Needs `_changes`."""
        removal = Removal(self._store.delete(name, version))
        self._refresh(name)
        with self._lock:
            self._removals.append(removal)
        self._cleaner.submit(self._finish_removals)
        return removal

    def _refresh(self, name: str) -> None:
        """Let the index know a name as the store does. Needs `_changes`."""
        try:
            self._index.put(name, self._store.versions(name), self._store.current(name))
        except AdapterNotFoundError:
            self._index.remove(name)
            self._last_used.pop(name, None)

    def _finish_removals(self) -> None:
        """The cleaner's job: free what was removed and is held by nobody any more, and tell who waits for it."""
        with self._changes:
            elsewhere = self._index.digests()  # before the lock, which the engine's thread takes to give a lease back
            with self._lock:
                removals = list(self._removals)
                removed = {digest for removal in removals for digest in removal.digests}
                free = {digest for digest in removed - elsewhere if not self._holders[digest]}
            for digest in free:
                self._store.discard_unreferenced(digest)
                self._residency.drop(digest)
            with self._lock:
                for removal in removals:
                    removal.digests -= free | elsewhere
                    if not removal.digests:
                        self._removals.remove(removal)
                        removal.freed.set_result(None)


def _count_down(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _copy(path: Path, staging: Staging, part: Part, max_bytes: int) -> None:
    with open_regular(path) as file, staging.writer(part, max_bytes) as writer:
        while chunk := file.read(_COPY_BYTES):
            writer.write(chunk)
