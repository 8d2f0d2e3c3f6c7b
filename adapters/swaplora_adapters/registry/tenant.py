"""What one tenant has of the registry: its own adapters and aliases, and the use of what others share with it.

Here names are made into those that are stored on their way in (see `naming`), and back on their way out, in answers and
in what errors say; the registry, the store and the engine know nothing of it. What is not defined here cannot be
reached.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.errors import (
    AdapterError,
    InvalidAdapterNameError,
    QuotaExceededError,
)
from swaplora_adapters.files.naming import TENANT_MARK
from swaplora_adapters.registry.card import Card, PutResult
from swaplora_adapters.registry.index import unknown
from swaplora_adapters.registry.leases import Lease, Removal, RequestLeases
from swaplora_adapters.registry.naming import Naming
from swaplora_adapters.registry.registry import Admit, Make, Registry, admit_all
from swaplora_adapters.registry.tenant_names import TenantNames
from swaplora_adapters.store.conditions import UNCONDITIONAL, Conditions
from swaplora_adapters.store.records import Alias, Canary, Mixing, Target, VersionRecord
from swaplora_adapters.store.staging import Staging


@dataclass(slots=True)
class Change:
    """A change that was asked for: of what, and what came of it."""

    kind: str
    name: str  # an adapter's, an alias or a mixture's
    version: int | None = None
    digest: str | None = None
    outcome: str = "done"  # or an error's code
    shared_with: Sequence[str] | None = None

    def came_to(self, record: VersionRecord) -> None:
        """What the name stands for now, or what it has lost."""
        self.version, self.digest = record.version, record.digest


class Room(NamedTuple):
    """How many adapters a tenant may have, and bytes of the files of all their versions; None is no bound."""

    adapters: int | None = None
    nbytes: int | None = None


ANY_ROOM = Room()


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
        self._tenant_names = TenantNames(registry.names, self._naming)
        self._note = note
        self._room = room

    @property
    def names(self) -> TenantNames:
        return self._tenant_names

    def check_whole(self, record: VersionRecord) -> None:
        self._registry.check_whole(record)

    def lease(self, reference: str, client: str | None = None) -> Lease:
        """Its record has the name that the tenant knows."""
        return self.lease_found(lambda: self._tenant_names.index.find(reference, client))

    def lease_found(self, find: Callable[[], VersionRecord]) -> Lease:
        """`find` tells of what is stored."""
        lease = self._registry.lease_found(find)
        return Lease(self._naming.record(lease.record), lambda _own: lease.release(), lease.stored)

    def lease_weights(self, leases: Sequence[Lease], _tenant: str = "", *, are_routed: bool = False) -> RequestLeases:
        return self._registry.lease_weights(leases, self._naming.tenant, are_routed=are_routed)

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
            return self._told(change, put)

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
            return self._told(change, put)

    def change(
        self,
        name: str,
        *,
        current: int | None = None,
        is_pinned: bool | None = None,
        shared_with: Sequence[str] | None = None,
        is_forced: bool = False,
    ) -> Card:
        kinds = {"adapter.current": current is not None, "adapter.pin": is_pinned}
        kinds |= {"adapter.unpin": is_pinned is False, "adapter.share": shared_with is not None}
        with self._changing(" ".join(kind for kind, is_asked in kinds.items() if is_asked), name) as change:
            change.shared_with = shared_with
            stored, names = self._own(name), self._registry.names

            def made() -> Card:
                if is_forced and current is not None and not names.may_follow(stored, current):
                    change.kind = change.kind.replace("adapter.current", "adapter.force")
                return self._registry.change(
                    stored, current=current, is_pinned=is_pinned, shared_with=shared_with, is_forced=is_forced
                )

            card = names.changes.make(made)
            change.came_to(card.record)
            return self._naming.card(card)

    def set_gate(self, name: str, gate: str | None, check: Callable[[], object] = lambda: None) -> Card:
        with self._changing("gate.delete" if gate is None else "gate.put", name):
            return self._naming.card(self._registry.set_gate(self._own(name), gate, check))

    def keep(self, reference: str) -> Lease:
        kept = self._registry.keep(self._tenant_names.stored_version(reference))
        return Lease(self._naming.record(kept.record), lambda _own: kept.release())

    def delete(self, name: str, version: int | None = None) -> Removal:
        with self._changing("adapter.delete", name) as change:
            removal = self._registry.delete(self._own(name), version)
            change.came_to(removal.records[-1])
            return removal

    def put_alias(self, alias: str, targets: Sequence[Target], canary: Canary | None = None) -> Alias:
        with self._changing("alias.put", alias):
            self._check_leads(alias, [target.reference for target in targets])
            stored = [Target(self._naming.stored(target.reference), target.weight) for target in targets]
            if canary is not None:
                canary = canary._replace(target=self._naming.stored(canary.target))
            return self._naming.alias(self._registry.put_alias(self._naming.stored_alias(alias), stored, canary))

    def delete_alias(self, alias: str, check: Callable[[], None] = lambda: None) -> None:
        with self._changing("alias.delete", alias):
            self._registry.delete_alias(self._naming.stored_alias(alias), check)

    def put_mixture(self, name: str, members: Sequence[str], mixing: Mixing) -> tuple[Alias, bool]:
        with self._changing("mixture.put", name):
            self._check_leads(name, members)
            stored = [self._naming.stored(member) for member in members]
            made, is_first = self._registry.put_mixture(self._naming.stored_mixture(name), stored, mixing)
            return self._naming.alias(made), is_first

    def delete_mixture(self, name: str) -> None:
        with self._changing("mixture.delete", name):
            self._registry.delete_mixture(self._naming.stored_mixture(name))

    def _check_leads(self, name: str, references: Sequence[str]) -> None:
        """Raise for what an alias or a mixture cannot be called, or what of another's it may not lead to."""
        if not self._naming.is_own(name):  # what it is stored as, the base is not called
            self._registry.names.check_is_not_base(name)
        for reference in references:
            if TENANT_MARK in reference:
                self._tenant_names.index.find_name(reference)

    def cards(self) -> list[Card]:
        cards = (card for card in self._registry.cards() if self._sees(card))
        return sorted(map(self._naming.card, cards), key=lambda card: card.record.name)

    def card(self, name: str) -> Card:
        key = self._naming.key(name)
        if key in self._registry.names.index and self._sees(card := self._registry.card(key)):
            return self._naming.card(card)
        raise unknown(name)

    def _told(self, change: Change, put: PutResult) -> PutResult:
        change.came_to(put.record)
        return put._replace(card=self._naming.card(put.card), record=self._naming.record(put.record))

    def _sees(self, card: Card) -> bool:
        return self._naming.sees(card.record.name, card.shared_with or ())

    def _own(self, name: str) -> str:
        """What it is stored as. Raises NotOwnerError for what is shared with the tenant, and AdapterNotFoundError."""
        if TENANT_MARK in name:
            self._tenant_names.check_is_own(name)
        return self._naming.key(name)

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
