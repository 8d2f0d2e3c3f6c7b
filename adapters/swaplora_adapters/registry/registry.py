"""Who is called what, and who holds what. A name is bound to one immutable version when a request is admitted.

Replace and delete act on names at once, and on versions when the last lease on them is back. Requests look only at
memory: `Names.changes` serialises what touches the disk, and the lock that leases take is never held across it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.errors import (
    AdapterError,
    AdapterFailedError,
    AdapterNotFoundError,
    MemoryFullError,
    PreconditionFailedError,
    QuotaExceededError,
    StorageFailedError,
    StorageFullError,
)
from swaplora_adapters.fit.base import BaseLayers
from swaplora_adapters.intake import inspect_files
from swaplora_adapters.registry.card import AdapterState, Card, PutResult
from swaplora_adapters.registry.cards import Cards
from swaplora_adapters.registry.changes import Looks
from swaplora_adapters.registry.leases import Lease, LeaseCounts, Removal, RequestLeases
from swaplora_adapters.registry.loader import AdapterLoader
from swaplora_adapters.registry.names import Judgement, Names
from swaplora_adapters.registry.pin_limits import Pin, PinLimits
from swaplora_adapters.registry.residency.host_tier import HostTier
from swaplora_adapters.registry.residency.residency import Residency, show
from swaplora_adapters.registry.usage import Unheard, UsageByName, UsageListener
from swaplora_adapters.store.conditions import UNCONDITIONAL, Conditions
from swaplora_adapters.store.journal import NotSentError
from swaplora_adapters.store.records import Alias, Canary, Mixing, Target, Touched, VersionRecord
from swaplora_adapters.store.shared.extras import Extras
from swaplora_adapters.store.staging import Staging
from swaplora_adapters.store.store import Store
from swaplora_adapters.weights.placement import Placement
from swaplora_adapters.weights.router import PROTOTYPE_ITEM_BYTES
from swaplora_adapters.weights.served import AdapterWeights

# Writes a staging folder's two files, or rewrites them, and says how: a version's provenance.
Make = Callable[[Staging], str]


# Raises if whoever asks may not have so much: a name, its digest, and the bytes of both files.
Admit = Callable[[str, str, int], None]


def admit_all(_name: str, _digest: str, _nbytes: int) -> None:
    """For whom there is no bound."""


class Fetcher(Protocol):
    """Where adapters are fetched from; `sources` implements it."""

    def fetch(
        self, uri: str, staging: Staging, *, is_operators: bool = False, cancellation: Cancellation | None = None
    ) -> str:
        """Write the two files that `uri` leads to into `staging`; returns what to show as the source."""


class Registry:
    """Owns names, leases and, through the residency, the weights in memory. Thread-safe."""

    def __init__(
        self,
        store: Store,
        *,
        sources: Fetcher,
        layers: BaseLayers,
        dtype: torch.dtype,
        memory_budget: int,
        wait_seconds: float,
        keep_versions: int,
        base_model: str,
        placement: Placement | None = None,
        prepare: Callable[[AdapterWeights], AdapterWeights] = lambda weights: weights,
        host: HostTier | None = None,
        listener: UsageListener | None = None,
        report: Callable[[Exception], None] = show,
        pinned_bytes: Callable[[str], int | None] = lambda _tenant: None,
    ) -> None:
        """`layers` are the base's that adapters may change; weights are kept in `dtype`.

        No request waits for memory for more than `wait_seconds`. `base_model` is the base's name: an adapter that was
        made for another one is taken with a warning. `placement` lays the factors of linears into memory, and `prepare`
        makes of an adapter's weights what is served, the same on their device with `tables` filled in: both on the
        thread that loads. `host` keeps adapters as they were before `prepare`, if there is one. `listener` is told what
        becomes of adapters in memory, and `report` why what other servers change is not known here. `pinned_bytes` is
        what a tenant may pin, see `PinLimits`.
        """
        self._store = store
        self._sources = sources
        self._layers = layers
        self._dtype = dtype
        self._placement = placement
        self._base_model = base_model
        self._pin_limits = PinLimits(memory_budget, pinned_bytes)
        self._lease_counts = LeaseCounts()
        self._names = Names(
            store,
            base_model=base_model,
            keep_versions=keep_versions,
            on_adopted=self._know_others_changes,
            reading=self._lease_counts.lock,
            wanted=self._wanted,
        )
        self._usage = UsageByName(Unheard() if listener is None else listener)
        self._host = HostTier(0) if host is None else host
        self._loader = AdapterLoader(
            store,
            self._names.copies.bring,
            self._host,
            self._usage,
            layers=layers,
            dtype=dtype,
            placement=placement,
            prepare=prepare,
        )
        self._residency = Residency(
            self._loader.load, memory_budget, wait_seconds, on_evict=self._usage.evicted, to_bring=self._loader.to_bring
        )
        self._cards = Cards(self._names, self._lease_counts, self._residency, self._host, self._num_bytes)
        self._cleaner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-free")
        self._residency.pin(self._pinned())
        self._looks = Looks(self._names.changes, store.tidy, report) if store.is_shared else None

    def seen(self) -> Future[None]:
        """Done once every change is known here that any server has acknowledged before; fails where that is not known.

        Fails with StoreUnreachableError, at once where the store has not answered for some time.
        """
        if self._looks is not None:
            return self._looks.wanted()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def extras(self) -> Extras | None:
        """What servers share besides, if they share anything."""
        return self._store.extras

    @property
    def waits_for_store(self) -> bool:
        """Whether somebody waits for what is shared, who may wait for long."""
        return self._store.is_awaited

    @property
    def revision(self) -> int:
        """Of the last change that is known here."""
        return self._store.revision

    def pins_not_kept(self) -> list[str]:
        """Names that are pinned and may leave memory all the same, because all pinned ones do not fit at once."""
        digests = self._residency.pins_not_kept()
        return [n.current.name for n in self._names.index.all() if n.is_pinned and n.current.digest in digests]

    @property
    def names(self) -> Names:
        """To look at; what is changed is changed here."""
        return self._names

    def check_whole(self, record: VersionRecord) -> None:
        """Raise AdapterFailedError for a version that is known to be damaged."""
        if (reason := self._cards.failure(record)) is not None:
            raise AdapterFailedError(f"{record.name}@{record.version}: {reason}")

    def lease(self, reference: str, client: str | None = None) -> Lease:
        """Bind `reference` to a version now. This takes no memory: see `lease_weights`.

        `client` is whose request it is, for an alias that splits. Raises AdapterNotFoundError, VersionNotFoundError.
        """
        return self.lease_found(lambda: self._names.index.resolve(reference, client))

    def lease_found(self, find: Callable[[], VersionRecord]) -> Lease:
        """The same for the version that `find` finds. Raises what that does."""
        with self._lease_counts.lock:
            record = find()
            self._lease_counts.take(record)
            return Lease(record, self._give_back)

    def lease_weights(self, leases: Sequence[Lease], tenant: str = "", *, are_routed: bool = False) -> RequestLeases:
        """Have the weights of all these in memory together, loaded if they are not there.

        With `are_routed` there is room for their prototypes as well. Where memory is short tenants take turns. The
        leases are then given back with it.
        """
        records = [lease.stored for lease in leases]
        for record in records:
            self._usage.asked(record)
        beside = {record.digest: self._prototype_bytes(record) for record in records if are_routed}
        claim = self._residency.retain({record.digest: self._num_bytes(record) for record in records}, tenant, beside)
        were_there = claim.weights.done()
        if not (were_there and claim.weights.exception()):  # refused at once: nobody looked
            self._usage.looked_up(records, were_there=were_there)
        return RequestLeases(leases, claim, self._residency.release)

    def stage(self) -> Staging:
        """A folder to write an upload into."""
        return self._store.stage()

    def put(
        self,
        name: str,
        staging: Staging,
        *,
        source: str,
        conditions: Conditions = UNCONDITIONAL,
        make: Make | None = None,
        admit: Admit = admit_all,
    ) -> PutResult:
        """Check staged files whole and make them the current version of `name`, or a candidate of its gate, durably.

        `make` makes them first, or makes them into others; `admit` is asked when they are known. Raises what these do,
        InvalidAdapterError with every reason, AdapterTooLargeError, PreconditionFailedError, StorageFullError, and
        for a pinned name MemoryFullError or QuotaExceededError if its new version may not be pinned beside the others.
        The old version then serves on, and its card says why.
        """
        with self._told_on_the_card(name):
            return self._put(name, staging, source, conditions, make, admit)

    def put_source(
        self,
        name: str,
        uri: str,
        *,
        conditions: Conditions = UNCONDITIONAL,
        is_operators: bool = False,
        make: Make | None = None,
        cancellation: Cancellation | None = None,
        admit: Admit = admit_all,
    ) -> PutResult:
        """Fetch an adapter from a source that the operator enabled, or wrote (`is_operators`), and `put` it.

        Raises SourceNotAllowedError, SourceNotFoundError and SourceFailedError as well, and WorkCancelledError when
        `cancellation` comes before all of it has come.
        """
        if conditions.if_none_match and name in self._names.index:
            raise PreconditionFailedError(f"adapter {name} exists already")
        with self._store.stage() as staging, self._told_on_the_card(name):
            pinned_uri = self._sources.fetch(uri, staging, is_operators=is_operators, cancellation=cancellation)
            return self._put(name, staging, pinned_uri, conditions, make, admit)

    def change(
        self,
        name: str,
        *,
        current: int | None = None,
        is_pinned: bool | None = None,
        shared_with: Sequence[str] | None = None,
        is_forced: bool = False,
    ) -> Card:
        """Roll `name` to one of its versions, keep it in memory or no longer, share it with others, or all at once.

        Raises AdapterNotFoundError, VersionNotFoundError, MemoryFullError when all that is pinned would not fit,
        QuotaExceededError for more than the tenant may pin, AdapterFailedError for a version that is known to be
        damaged, and GateFailedError for one that has not passed, unless it `is_forced`.
        """

        def change() -> Card:
            record = self._names.index.resolve_name(name if current is None else f"{name}@{current}")
            if current is not None:
                self.check_whole(record)
            stays_pinned = current is not None and self._names.index.get(name).is_pinned
            if stays_pinned if is_pinned is None else is_pinned:
                self._check_pins(name, record.digest, self._num_bytes(record))
            named = self._names.change(
                name, current=current, is_pinned=is_pinned, shared_with=shared_with, is_forced=is_forced
            )
            self._residency.pin(self._pinned())
            return self._cards.of(named)

        return self._names.changes.make(change)

    def set_gate(self, name: str, gate: str | None, check: Callable[[], object] = lambda: None) -> Card:
        """See `Names.set_gate`."""
        return self._cards.of(self._names.set_gate(name, gate, check))

    def judge(self, name: str, found: Judgement) -> Card | None:
        """Note what a gate has found, and let `name` stand for a version that has passed: both at once, durably.

        None, and nothing is done, where gate, version or current version have changed since it was asked.
        """

        def judge(found: Judgement) -> Card | None:
            if not self._names.is_due(name, found):
                return None
            record, is_current = self._names.index.resolve_name(f"{name}@{found.version}"), found.has_passed
            if is_current and self._names.index.get(name).is_pinned:
                try:
                    self._check_pins(name, record.digest, self._num_bytes(record))
                except (MemoryFullError, QuotaExceededError) as error:
                    is_current, verdict = False, {**found.verdict, "reason": f"it has passed, but is pinned: {error}"}
                    found = replace(found, verdict=verdict)
            self._names.judge(name, found, is_current=is_current)
            self._residency.pin(self._pinned())
            return self.card(name)

        return self._names.changes.make(lambda: judge(found))

    def keep(self, reference: str) -> Lease:
        """Have the version that this names stay until it is given back or deleted, however many newer ones come.

        Raises AdapterNotFoundError and VersionNotFoundError.
        """
        return self._lease_counts.keep(self._names.index.resolve_name(reference))

    def delete(self, name: str, version: int | None = None) -> Removal:
        """Remove a name, or one version of it, for new requests now; running ones end on what they hold.

        Raises AdapterNotFoundError, VersionNotFoundError, AdapterBusyError, and for a pinned name MemoryFullError or
        QuotaExceededError if its next version may not be pinned.
        """

        def delete() -> Removal:
            successor = self._names.successor(name, version)
            if successor is not None and self._names.index.get(name).is_pinned:
                self._check_pins(name, successor.digest, self._num_bytes(successor))
            removal = self._remove(name, version)
            self._residency.pin(self._pinned())
            return removal

        return self._names.changes.make(delete)

    def put_alias(self, alias: str, targets: Sequence[Target], canary: Canary | None = None) -> Alias:
        """See `Names.put_alias`."""
        return self._names.put_alias(alias, targets, canary)

    def step_back(self, alias: str, canary: Canary, reason: str) -> bool:
        """See `Names.step_back`."""
        return self._names.step_back(alias, canary, reason)

    def delete_alias(self, alias: str, check: Callable[[], None] = lambda: None) -> None:
        """See `Names.remove_alias`."""
        self._names.remove_alias(alias, check)

    def put_mixture(self, name: str, members: Sequence[str], mixing: Mixing) -> tuple[Alias, bool]:
        """See `Names.put_mixture`."""
        return self._names.put_mixture(name, members, mixing)

    def delete_mixture(self, name: str) -> None:
        """Raises MixtureNotFoundError."""
        self._names.remove_mixture(name)

    def cards(self) -> list[Card]:
        """Every adapter, in order of name."""
        return self._cards.all()

    def card(self, name: str) -> Card:
        """Raises AdapterNotFoundError."""
        return self._cards.of(self._names.index.get(name))

    @property
    def resident_bytes(self) -> int:
        return self._residency.resident_bytes

    @property
    def host_bytes(self) -> int:
        """Of adapters that are kept in the host's memory beside the device's."""
        return self._host.nbytes

    def states(self) -> list[AdapterState]:
        """Where each name's current version is at this moment, and how much it takes, in order of name."""
        return self._cards.states()

    @property
    def memory_budget(self) -> int:
        """In bytes, for resident adapters."""
        return self._residency.budget

    def check_integrity(self) -> None:
        """Raise RuntimeError if counts are off, or if with no lease out something still waits to be freed."""
        self._residency.check_integrity()
        self._cleaner.submit(self._finish_removals).result()
        self._lease_counts.check_integrity()
        self._host.check_integrity()

    def stop(self) -> None:
        """Refuse whoever waits for memory, or asks for it from now on, with StoppingError."""
        self._residency.stop()

    def close(self) -> None:
        if self._looks is not None:
            self._looks.close()
        self._names.changes.close()
        self._cleaner.shutdown()
        self._residency.close()
        self._loader.close()
        self._store.close()

    @contextmanager
    def _told_on_the_card(self, name: str) -> Iterator[None]:
        """Note why the body could not replace `name`, unless a condition of the sender's was not met."""
        try:
            yield
        except AdapterError as error:
            if name in self._names.index and not isinstance(error, PreconditionFailedError):
                self._cards.note_failure(name, str(error))
            raise

    def _put(
        self, name: str, staging: Staging, source: str, conditions: Conditions, make: Make | None, admit: Admit
    ) -> PutResult:
        provenance = None if make is None else make(staging)
        found = inspect_files(
            staging.config_path,
            staging.weights_path,
            self._layers,
            self._dtype,
            base_model=self._base_model,
            placement=self._placement,
        )
        details = replace(found.details, provenance=provenance)
        nbytes = details.num_parameters * self._dtype.itemsize
        self._residency.check_size(nbytes)
        file_bytes = staging.config_path.stat().st_size + staging.weights_path.stat().st_size

        def check() -> None:
            admit(name, details.digest, file_bytes)
            self._names.check_is_free(name)
            named = self._names.index.get(name) if name in self._names.index else None
            conditions.check(name, self._names.was_used(name), None if named is None else named.current)
            if conditions.if_news:
                self._names.check_is_news(name, details.digest)
            if named is not None and named.is_pinned and named.gate is None:
                self._check_pins(name, details.digest, nbytes)

        if self._store.is_shared:
            self._names.changes.make(check)  # or what is refused would fill the shared store
            is_known = details.digest in self._names.index.digests()
            (self._store.mend if is_known else self._store.send)(staging, details.digest)

        def publish() -> PutResult:
            check()
            published = self._names.publish(name, staging, details, source=source, conditions=conditions)
            return PutResult(self.card(name), published.record, is_first=published.previous is None)

        try:
            try:
                return self._published(name, publish)
            except NotSentError:  # what had these files was deleted since; nothing is held while they are sent
                self._names.changes.check_known()
                self._store.send(staging, details.digest)
                return self._published(name, publish)
        except AdapterError as error:
            if not isinstance(error, StorageFailedError):  # after which it may be made all the same
                self._store.take_back(staging, details.digest)
            raise

    def _published(self, name: str, publish: Callable[[], PutResult]) -> PutResult:
        with self._names.changes:
            put = self._names.changes.make(publish)
            self._residency.forget_failure(put.record.digest)  # its file may have been damaged, and is whole again
            self._cards.forget_failure(name)
            self._retire(name)
            self._residency.pin(self._pinned())
            return put._replace(card=self.card(name)) if name in self._names.index else put

    def _retire(self, name: str) -> None:
        """Remove versions beyond those that are kept; one too many is kept until the next replace."""

        def remove(version: int) -> None:
            if version in {record.version for record in self._names.outdated(name)}:  # or others rolled back to it
                self._remove(name, version)

        with suppress(StorageFullError, StorageFailedError, AdapterNotFoundError):
            for record in self._names.outdated(name):
                if not self._lease_counts.is_kept(record):
                    self._names.changes.make(partial(remove, record.version))

    def _num_bytes(self, record: VersionRecord) -> int:
        """In memory."""
        return record.num_parameters * self._dtype.itemsize

    def _prototype_bytes(self, record: VersionRecord) -> int:
        """Of the vectors that a mixture makes of it: at most one for each linear of the names that it is for."""
        linears = self._layers.linears.items()
        inputs = [shape.in_features for path, shape in linears if path.rpartition(".")[2] in record.targets]
        return PROTOTYPE_ITEM_BYTES * sum(inputs)

    def _pinned(self) -> dict[str, int]:
        """Digest → bytes of what is to stay in memory."""
        pinned = [named.current for named in self._names.index.all() if named.is_pinned]
        for record in pinned:
            self._usage.asked(record)
        return {record.digest: self._num_bytes(record) for record in pinned}

    def _check_pins(self, name: str, digest: str, nbytes: int) -> None:
        """Raise what forbids that what is pinned stays so with this as the current version of `name`.

        MemoryFullError where all of it would not fit, QuotaExceededError for more than its tenant may pin.
        """
        pinned = [named.current for named in self._names.index.all() if named.is_pinned]
        pins = {record.name: Pin(record.name, record.digest, self._num_bytes(record)) for record in pinned}
        now = pins.pop(name, None)
        self._pin_limits.check(Pin(name, digest, nbytes), pins.values(), now)
        self._residency.check_pins({pin.digest: pin.nbytes for pin in pins.values()} | {digest: nbytes})

    def _give_back(self, lease: Lease) -> None:
        """Called by a lease, once, on the thread its request ended on; what touches the disk is the cleaner's."""
        with self._lease_counts.lock:
            if self._lease_counts.give_back(lease.record):
                self._cleaner.submit(self._finish_removals)

    def _remove(self, name: str, version: int | None) -> Removal:
        """Within a change that is made."""
        removal = self._lease_counts.add(self._names.remove(name, version))
        if name not in self._names.index:
            self._lease_counts.forget(name)
            self._cards.forget_failure(name)
        self._cleaner.submit(self._finish_removals)
        return removal

    def _know_others_changes(self, touched: Touched, gone: set[VersionRecord]) -> None:
        """What another server has removed goes as if it had been removed here. Needs `Names.changes`."""
        for name in touched.names:
            self._cards.forget_failure(name)
            if name not in self._names.index:
                self._lease_counts.forget(name)
                continue
            for record in self._names.index.get(name).versions:
                self._residency.forget_failure(record.digest)
        if gone:
            self._lease_counts.add(list(gone))
            self._cleaner.submit(self._finish_removals)
        self._residency.pin(self._pinned())

    @contextmanager
    def _wanted(self) -> Iterator[Mapping[str, float]]:
        """See `Copies`: what is leased, in memory, on its way there, or pinned stays. Nothing is leased meanwhile."""
        pinned = {named.current.digest for named in self._names.index.all() if named.is_pinned}
        with self._lease_counts.lock:
            resident, awaited = self._residency.digests()
            stay = resident | awaited | pinned | self._lease_counts.digests()
            yield self._lease_counts.used | dict.fromkeys(stay, float("inf"))

    def _finish_removals(self) -> None:
        """The cleaner's job: free what was removed and is held by nobody any more, and tell who waits for it."""
        with self._names.changes.held_at_last():
            elsewhere = self._names.index.digests()
            removable = self._lease_counts.removable(elsewhere)
            for digest in removable:
                self._residency.drop(digest)
                self._host.drop(digest)
                self._usage.forget(digest)
                with suppress(StorageFailedError):  # what a failing disk keeps is swept at the next start
                    self._store.discard_unreferenced(digest)
            self._lease_counts.settle(removable | elsewhere)
