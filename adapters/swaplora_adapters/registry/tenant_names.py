"""The names that a tenant may say: its own, and those of what others share with it, as if there were no others."""

from pathlib import Path

from swaplora_adapters.errors import NotOwnerError
from swaplora_adapters.files.naming import TENANT_MARK, validate_name
from swaplora_adapters.registry.changes import Changes
from swaplora_adapters.registry.index import Index, MayAsk, NamedVersions, may_ask_all, unknown
from swaplora_adapters.registry.names import Names
from swaplora_adapters.registry.naming import Naming
from swaplora_adapters.store.records import Alias, VersionRecord


class TenantIndex(Index):
    """What each name that it may say stands for."""

    def __init__(self, index: Index, naming: Naming) -> None:
        self._index = index
        self._naming = naming

    def __contains__(self, name: str) -> bool:
        return TENANT_MARK not in name and self._naming.stored(name) in self._index

    def is_alias(self, name: str) -> bool:
        return TENANT_MARK not in name and self._index.is_alias(self._naming.stored_alias(name))

    def all(self) -> list[NamedVersions]:
        """In order of name."""
        told = (self._naming.named(named) for named in self._index.all() if self._naming.may_ask(named))
        return sorted(told, key=lambda named: named.current.name)

    def is_mixture(self, name: str) -> bool:
        return TENANT_MARK not in name and self._index.is_mixture(self._naming.stored_mixture(name))

    def gated(self) -> list[NamedVersions]:
        """Its own that have a gate."""
        own = (named for named in self._index.gated() if self._naming.is_own(named.current.name))
        return [self._naming.named(named) for named in own]

    def aliases(self) -> list[Alias]:
        """In order of alias."""
        return [self._naming.alias(alias) for alias in self._index.aliases() if self._naming.is_own(alias.alias)]

    def mixtures(self) -> list[Alias]:
        """In order of name."""
        return [self._naming.alias(mix) for mix in self._index.mixtures() if self._naming.is_own(mix.alias)]

    def get(self, name: str) -> NamedVersions:
        """Raises AdapterNotFoundError."""
        key = self._naming.key(name)
        if key in self._index and self._naming.may_ask(named := self._index.get(key)):
            return self._naming.named(named)
        raise unknown(name)

    def alias(self, alias: str) -> Alias:
        """Raises AliasNotFoundError."""
        with self._naming.told():
            return self._naming.alias(self._index.alias(self._naming.stored_alias(alias)))

    def mixture(self, name: str) -> Alias:
        """Raises MixtureNotFoundError."""
        with self._naming.told():
            return self._naming.alias(self._index.mixture(self._naming.stored_mixture(name)))

    def resolve(self, reference: str, client: str | None = None, _may_ask: MayAsk = may_ask_all) -> VersionRecord:
        """See `Index.resolve`; what it may ask is what this tenant may."""
        return self._naming.record(self.find(reference, client))

    def find(self, reference: str, client: str | None = None) -> VersionRecord:
        """The same, with the name that the registry knows it by."""
        with self._naming.told():
            stored = self._naming.stored(reference)
            if TENANT_MARK in reference:  # an adapter's: aliases are told to nobody else
                return self.find_name(reference)
            return self._index.resolve(stored, client, self._naming.may_ask)

    def resolve_name(self, reference: str, _may_ask: MayAsk = may_ask_all) -> VersionRecord:
        """See `Index.resolve_name`; what it may ask is what this tenant may."""
        return self._naming.record(self.find_name(reference))

    def find_name(self, reference: str) -> VersionRecord:
        """The same, with the name that the registry knows it by."""
        with self._naming.told():
            return self._index.resolve_name(self._naming.stored(reference), self._naming.may_ask)


class TenantNames(Names):
    """Who is called what, of the names that it may say."""

    def __init__(self, names: Names, naming: Naming) -> None:
        self._names = names
        self._naming = naming
        self.index: TenantIndex = TenantIndex(names.index, naming)
        self.changes: Changes = names.changes

    def check_adapter_name(self, name: str) -> None:
        """See `Names.check_adapter_name`: what the base is called is nobody's name."""
        validate_name(name)
        self.check_is_free(name)

    def check_is_free(self, name: str) -> None:
        """See `Names.check_is_free`."""
        self._names.check_is_not_base(name)
        with self._naming.told():
            self._names.check_is_free(self._naming.stored(name))

    def check_is_own(self, reference: str) -> None:
        """Raise NotOwnerError for what another tenant shares with this one; AdapterNotFoundError, VersionNotFoundError.

        For whoever wants more than an answer of it.
        """
        record = self.index.find_name(reference)
        if not self._naming.is_own(record.name):
            name = self._naming.said(record.name)
            raise NotOwnerError(f"{name} is shared with this tenant, which may ask it: all else is its owner's")

    def stored_version(self, reference: str) -> str:
        """A version that this tenant may ask, as the registry knows it. AdapterNotFoundError, VersionNotFoundError."""
        record = self.index.find_name(reference)
        return f"{record.name}@{record.version}"

    def link_files(self, reference: str, folder: Path) -> VersionRecord:
        """See `Names.link_files`. Raises NotOwnerError as well: a copy would outlive that it is shared."""
        self.check_is_own(reference)
        with self._naming.told():
            return self._naming.record(self._names.link_files(self._naming.stored(reference), folder))
