"""What a tenant calls adapters and aliases, and what these are stored as.

What tenant `acme` calls `sql` is stored as `acme~sql`, a name that no adapter and no alias can be given; what the
default tenant, "", calls `sql` is stored so. Another tenant that may ask it calls it `acme~sql`, or `default~sql`: by
whose it is, whatever it has itself. Its owner may say so too.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

from swaplora_adapters.errors import (
    AdapterError,
    AdapterNotFoundError,
    AliasNotFoundError,
    InvalidAdapterError,
    MixtureNotFoundError,
)
from swaplora_adapters.files.naming import DEFAULT_TENANT, TENANT_MARK, is_tenant
from swaplora_adapters.registry.card import Card
from swaplora_adapters.registry.index import EVERYBODY, NamedVersions
from swaplora_adapters.store.records import Alias, Target, VersionRecord

SHARED = "shared"  # a record's source, for whom it is shared with


class Naming:
    """One tenant's names: as it says them, and as they are stored."""

    def __init__(self, tenant: str) -> None:
        """`tenant` is "" for the default one."""
        self.tenant = tenant
        self._owner = tenant or DEFAULT_TENANT
        self._prefix = tenant + TENANT_MARK if tenant else ""
        self._own_prefix = re.compile(rf"(?<![a-z0-9-]){self._prefix}")  # of no other tenant whose name ends so

    def stored(self, reference: str) -> str:
        """A name, or a reference to a version, of one's own or of another tenant, as the index resolves it.

        Raises AdapterNotFoundError for what can be nobody's.
        """
        owner, mark, name = reference.removeprefix("base:").rpartition(TENANT_MARK)
        if not mark:
            return self._prefix + name if self._prefix else reference
        if not is_tenant(owner):
            raise AdapterNotFoundError(f"there is no adapter called {reference[:128]!r}")
        return self._prefix + name if owner == self._owner else owner + TENANT_MARK + name

    def key(self, name: str) -> str:
        """What is stored under a name is stored as. Raises AdapterNotFoundError."""
        return self.stored(name).removeprefix(DEFAULT_TENANT + TENANT_MARK)

    def stored_alias(self, alias: str) -> str:
        """Raises AliasNotFoundError: nobody is shown another's aliases."""
        if TENANT_MARK in alias:
            raise AliasNotFoundError(f"there is no alias called {alias[:128]!r}")
        return self._prefix + alias

    def stored_mixture(self, name: str) -> str:
        """Raises MixtureNotFoundError: nobody is shown another's mixtures."""
        if TENANT_MARK in name:
            raise MixtureNotFoundError(f"there is no mixture called {name[:128]!r}")
        return self._prefix + name

    def is_own(self, stored: str) -> bool:
        """Whether what is stored so is this tenant's."""
        return stored.startswith(self._prefix) if self._prefix else TENANT_MARK not in stored

    def may_ask(self, named: NamedVersions) -> bool:
        """Whether it is this tenant's, or is shared with it."""
        return self.sees(named.current.name, named.shared_with)

    def sees(self, stored: str, shared_with: Collection[str]) -> bool:
        """The same of what is stored as `stored`."""
        return self.is_own(stored) or EVERYBODY in shared_with or self._owner in shared_with

    def said(self, stored: str) -> str:
        if self.is_own(stored):
            return stored.removeprefix(self._prefix)
        return stored if TENANT_MARK in stored else DEFAULT_TENANT + TENANT_MARK + stored

    def record(self, record: VersionRecord) -> VersionRecord:
        """As the tenant knows it."""
        if self.is_own(record.name):
            return replace(record, name=self.said(record.name)) if self._prefix else record
        return replace(record, name=self.said(record.name), source=SHARED, provenance=None, standing=None, verdict=None)

    def alias(self, alias: Alias) -> Alias:
        """An alias or a mixture as the tenant knows it."""
        targets = tuple(Target(self.said(target.reference), target.weight) for target in alias.targets)
        canary = alias.canary and alias.canary._replace(target=self.said(alias.canary.target))
        return replace(alias, alias=self.said(alias.alias), targets=targets, canary=canary)

    def named(self, named: NamedVersions) -> NamedVersions:
        """As the tenant knows it."""
        gate = named.gate if self.is_own(named.current.name) else None
        versions = tuple(self.record(each) for each in named.versions)
        return replace(named, current=self.record(named.current), versions=versions, gate=gate)

    def card(self, card: Card) -> Card:
        """As the tenant knows it; of another's not how its owner came by it, and who else asks it."""
        told = replace(card, record=self.record(card.record), versions=[self.record(each) for each in card.versions])
        if not self.is_own(card.record.name):
            told = replace(told, num_in_flight=None, last_used=None, last_failure=None)
            return replace(told, shared_with=None, is_gated=None)
        failure = card.last_failure and card.last_failure._replace(reason=self.unsaid(card.last_failure.reason))
        return replace(told, last_failure=failure)

    def unsaid(self, message: str) -> str:
        """A message without what the tenant's names are stored with."""
        return self._own_prefix.sub("", message) if self._prefix else message

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
