"""What one tenant has of the registry: its own names and aliases, as if there were no others.

What it calls `sql` is stored as `acme~sql`, which nobody can ask for: no name and no alias has the mark. Those of the
default tenant, "", are stored as they are. Here names are made longer on their way in and shorter on their way out, in
answers and in what errors say; the registry, the store and the engine know nothing of it. What is not defined here
cannot be reached: the names of others are neither found, nor told, nor in anybody's way.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.errors import (
    AdapterError,
    AdapterNotFoundError,
    AliasNotFoundError,
    InvalidAdapterError,
    InvalidAdapterNameError,
    QuotaExceededError,
)
from swaplora_adapters.files.naming import TENANT_MARK, validate_name
from swaplora_adapters.registry.card import Card, PutResult
from swaplora_adapters.registry.index import Index, NamedVersions
from swaplora_adapters.registry.leases import Lease, Removal, RequestLeases
from swaplora_adapters.registry.names import Names
from swaplora_adapters.registry.registry import Admit, Make, Registry, admit_all
from swaplora_adapters.store.conditions import UNCONDITIONAL, Conditions
from swaplora_adapters.store.records import Alias, Target, VersionRecord
from swaplora_adapters.store.staging import Staging


@dataclass(slots=True)
class Change:
    """A change that was asked for: of what, and what came of it."""

    kind: str
    name: str  # an adapter's or an alias
    version: int | None = None
    digest: str | None = None
    outcome: str = "done"  # or an error's code

    def came_to(self, record: VersionRecord) -> None:
        """What the name stands for now, or what it has lost."""
        self.version, self.digest = record.version, record.digest


class Room(NamedTuple):
    """How many adapters a tenant may have, and bytes of the files of all their versions; None is no bound."""

    adapters: int | None = None
    nbytes: int | None = None


ANY_ROOM = Room()


class Naming:
    """One tenant's names: as it says them, and as they are stored."""

    def __init__(self, tenant: str) -> None:
        """`tenant` is "" for the default one."""
        self.tenant = tenant
        self._prefix = tenant + TENANT_MARK if tenant else ""

    def stored(self, reference: str) -> str:
        """A name, or a reference to a version. Raises AdapterNotFoundError for one that nobody may say."""
        if TENANT_MARK in reference:
            raise AdapterNotFoundError(f"there is no adapter called {reference[:128]!r}")
        return self._prefix + reference.removeprefix("base:") if self._prefix else reference

    def stored_alias(self, alias: str) -> str:
        """Raises AliasNotFoundError."""
        if TENANT_MARK in alias:
            raise AliasNotFoundError(f"there is no alias called {alias[:128]!r}")
        return self._prefix + alias

    def is_own(self, stored: str) -> bool:
        """Whether what is stored so is this tenant's."""
        return stored.startswith(self._prefix) if self._prefix else TENANT_MARK not in stored

    def said(self, stored: str) -> str:
        return stored.removeprefix(self._prefix)

    def record(self, record: VersionRecord) -> VersionRecord:
        """As the tenant knows it."""
        return replace(record, name=self.said(record.name)) if self._prefix else record

    def alias(self, alias: Alias) -> Alias:
        """As the tenant knows it."""
        targets = tuple(Target(self.said(target.reference), target.weight) for target in alias.targets)
        return Alias(self.said(alias.alias), targets)

    def named(self, named: NamedVersions) -> NamedVersions:
        """As the tenant knows it."""
        return replace(
            named, current=self.record(named.current), versions=tuple(self.record(each) for each in named.versions)
        )

    def card(self, card: Card) -> Card:
        """As the tenant knows it."""
        failure = card.last_failure and card.last_failure._replace(reason=self.unsaid(card.last_failure.reason))
        return replace(
            card,
            record=self.record(card.record),
            versions=[self.record(version) for version in card.versions],
            last_failure=failure,
        )

    def unsaid(self, message: str) -> str:
        """A message without what the tenant's names are stored with."""
        return message.replace(self._prefix, "") if self._prefix else message

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors of the body say names as the tenant says them."""
        try:
            yield
        except InvalidAdapterError as error:
            error.reasons = tuple(map(self.unsaid, error.reasons))
            error.args = ("; ".join(error.reasons),)
            raise
        except AdapterError as error:
            error.args = tuple(self.unsaid(part) if isinstance(part, str) else part for part in error.args)
            raise


class TenantIndex(Index):
    """What each of its names stands for."""

    def __init__(self, index: Index, naming: Naming) -> None:
        self._index = index
        self._naming = naming

    def __contains__(self, name: str) -> bool:
        return TENANT_MARK not in name and self._naming.stored(name) in self._index

    def is_alias(self, name: str) -> bool:
        return TENANT_MARK not in name and self._index.is_alias(self._naming.stored_alias(name))

    def all(self) -> list[NamedVersions]:
        """In order of name."""
        return [self._naming.named(named) for named in self._index.all() if self._naming.is_own(named.current.name)]

    def aliases(self) -> list[Alias]:
        """In order of alias."""
        return [self._naming.alias(alias) for alias in self._index.aliases() if self._naming.is_own(alias.alias)]

    def get(self, name: str) -> NamedVersions:
        """Raises AdapterNotFoundError."""
        with self._naming.told():
            return self._naming.named(self._index.get(self._naming.stored(name)))

    def alias(self, alias: str) -> Alias:
        """Raises AliasNotFoundError."""
        with self._naming.told():
            return self._naming.alias(self._index.alias(self._naming.stored_alias(alias)))

    def resolve(self, reference: str, client: str | None = None) -> VersionRecord:
        """See `Index.resolve`."""
        with self._naming.told():
            return self._naming.record(self._index.resolve(self._naming.stored(reference), client))

    def resolve_name(self, reference: str) -> VersionRecord:
        """See `Index.resolve_name`."""
        with self._naming.told():
            return self._naming.record(self._index.resolve_name(self._naming.stored(reference)))


class TenantNames(Names):
    """Who is called what, of its names."""

    def __init__(self, names: Names, naming: Naming) -> None:
        self._names = names
        self._naming = naming
        self.index: Index = TenantIndex(names.index, naming)
        self.changes: threading.RLock = names.changes

    def check_adapter_name(self, name: str) -> None:
        """See `Names.check_adapter_name`: what the base is called is nobody's name."""
        validate_name(name)
        self.check_is_free(name)

    def check_is_free(self, name: str) -> None:
        """See `Names.check_is_free`."""
        self._names.check_is_not_base(name)
        with self._naming.told():
            self._names.check_is_free(self._naming.stored(name))

    def link_files(self, reference: str, folder: Path) -> VersionRecord:
        """See `Names.link_files`."""
        with self._naming.told():
            return self._naming.record(self._names.link_files(self._naming.stored(reference), folder))


class TenantRegistry(Registry):
    """What a tenant may do with its adapters; each method is the registry's of that name. Thread-safe."""

    def __init__(
        self,
        registry: Registry,
        tenant: str,
        note: Callable[[Change], None] = lambda _change: None,
        room: Room = ANY_ROOM,
    ) -> None:
        """`tenant` is "" for the default one. `note` hears of every change once it is made or has failed."""
        self._registry = registry
        self._naming = Naming(tenant)
        self._note = note
        self._room = room

    @property
    def names(self) -> Names:
        return TenantNames(self._registry.names, self._naming)

    def lease(self, reference: str, client: str | None = None) -> Lease:
        """Its record has the name that the tenant knows."""
        with self._naming.told():
            lease = self._registry.lease(self._naming.stored(reference), client)
        return Lease(self._naming.record(lease.record), lambda _own: lease.release())

    def lease_weights(self, leases: Sequence[Lease], _tenant: str = "") -> RequestLeases:
        return self._registry.lease_weights(leases, self._naming.tenant)

    def stage(self) -> Staging:
        return self._registry.stage()

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
        with self._changing("adapter.put", name) as change:
            stored = self._new(name)
            put = self._registry.put(
                stored, staging, source=source, conditions=conditions, make=make, admit=self._admitting(admit)
            )
            change.came_to(put.card.record)
            return put._replace(card=self._naming.card(put.card))

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
        with self._changing("adapter.fetch", name) as change:
            stored = self._new(name)
            put = self._registry.put_source(
                stored,
                uri,
                conditions=conditions,
                is_operators=is_operators,
                make=make,
                cancellation=cancellation,
                admit=self._admitting(admit),
            )
            change.came_to(put.card.record)
            return put._replace(card=self._naming.card(put.card))

    def change(self, name: str, *, current: int | None = None, is_pinned: bool | None = None) -> Card:
        kinds = {"adapter.current": current is not None, "adapter.pin": is_pinned, "adapter.unpin": is_pinned is False}
        with self._changing(" ".join(kind for kind, is_asked in kinds.items() if is_asked), name) as change:
            card = self._registry.change(self._naming.stored(name), current=current, is_pinned=is_pinned)
            change.came_to(card.record)
            return self._naming.card(card)

    def delete(self, name: str, version: int | None = None) -> Removal:
        with self._changing("adapter.delete", name) as change:
            removal = self._registry.delete(self._naming.stored(name), version)
            change.came_to(removal.records[-1])
            return removal

    def put_alias(self, alias: str, targets: Sequence[Target]) -> Alias:
        with self._changing("alias.put", alias):
            if not self._naming.is_own(alias):  # what it is stored as, the base is not called
                self._registry.names.check_is_not_base(alias)
            stored = [Target(self._naming.stored(target.reference), target.weight) for target in targets]
            return self._naming.alias(self._registry.put_alias(self._naming.stored_alias(alias), stored))

    def delete_alias(self, alias: str) -> None:
        with self._changing("alias.delete", alias):
            self._registry.delete_alias(self._naming.stored_alias(alias))

    def cards(self) -> list[Card]:
        return [self._naming.card(card) for card in self._registry.cards() if self._naming.is_own(card.record.name)]

    def card(self, name: str) -> Card:
        with self._naming.told():
            return self._naming.card(self._registry.card(self._naming.stored(name)))

    def _admitting(self, admit: Admit) -> Admit:
        """Whom `admit` lets in, where the tenant has room for it."""
        if self._room == ANY_ROOM:
            return admit

        def both(stored: str, digest: str, nbytes: int) -> None:
            admit(stored, digest, nbytes)
            self._check_room(stored, digest, nbytes)

        return both

    def _check_room(self, stored: str, digest: str, nbytes: int) -> None:
        """Raise QuotaExceededError for more than the tenant may have; nobody else changes names meanwhile."""
        own = [named for named in self._registry.names.index.all() if self._naming.is_own(named.current.name)]
        same = next((named for named in own if named.current.name == stored), None)
        if same is not None and same.current.digest == digest:
            return  # nothing is added
        most, most_bytes = self._room
        if most is not None and same is None and len(own) >= most:
            raise QuotaExceededError(f"this tenant may have {most} adapters: delete one first")
        has = sum(version.nbytes for named in own for version in named.versions)
        if most_bytes is not None and has + nbytes > most_bytes:
            raise QuotaExceededError(
                f"this tenant may have {most_bytes} bytes of adapters, has {has}, and this one has {nbytes}: "
                "delete adapters or versions first"
            )

    @contextmanager
    def _changing(self, kind: str, name: str) -> Iterator[Change]:
        """The body makes a change, which is noted however it ends."""
        change = Change(kind, name)
        try:
            with self._naming.told():
                yield change
        except BaseException as error:
            change.outcome = error.code if isinstance(error, AdapterError) else "failed"
            raise
        finally:
            self._note(change)

    def _new(self, name: str) -> str:
        """Raises InvalidAdapterNameError, as the store does for what it is not to hold."""
        if TENANT_MARK in name:
            raise InvalidAdapterNameError(f"{name[:128]!r} is no adapter's name")
        return self._naming.stored(name)
