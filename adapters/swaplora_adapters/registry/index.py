"""What each name stands for, in memory: looked at for every request, so never behind a disk."""

import hashlib
import math
import random
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from swaplora_adapters.errors import (
    AdapterNotFoundError,
    AliasNotFoundError,
    MixtureNotFoundError,
    VersionNotFoundError,
)
from swaplora_adapters.files.naming import DEFAULT_TENANT, TENANT_MARK, tenant_of
from swaplora_adapters.store.records import Alias, Standing, Target, VersionRecord

EVERYBODY = "*"  # in place of tenants
_REFERENCE = re.compile(
    rf"(?:base:)?(?:{DEFAULT_TENANT}{TENANT_MARK})?"
    r"(?P<name>[^@:]+)(?:@(?:(?P<version>[1-9][0-9]{0,8})|sha256:(?P<digest>[0-9a-f]{12,64})))?"
)
_HASH_BITS = 52  # as many as leave a float between 0 and 1 neither of the two


class Reference(NamedTuple):
    """`name`, `name@3` or `name@sha256:<12 or more hex>`, taken apart."""

    name: str
    version: int | None
    digest: str | None  # the hex that it begins with

    def means(self, record: VersionRecord) -> bool:
        """Whether it stands for this version of its name, if not for the current one."""
        if self.version is not None:
            return record.version == self.version
        return self.digest is None or record.digest.startswith(f"sha256:{self.digest}")


@dataclass(frozen=True, slots=True)
class NamedVersions:
    """One name's versions, oldest first, the one it stands for, and whether that one is to stay in memory.

    `shared_with` are the tenants, besides whose it is, that may ask it, or EVERYBODY alone.
    """

    current: VersionRecord
    versions: tuple[VersionRecord, ...]
    is_pinned: bool
    shared_with: tuple[str, ...] = ()
    gate: str | None = None  # what new versions must show, in words that are not ours

    def may_follow(self, record: VersionRecord) -> bool:
        """Whether the name may stand for this one of its versions."""
        return self.gate is None or record.has_passed

    @property
    def candidates(self) -> list[VersionRecord]:
        """Versions that its gate is to judge, newest first."""
        newer = (r for r in self.versions if r.version > self.current.version and r.standing is Standing.CANDIDATE)
        return [] if self.gate is None else [*newer][::-1]


MayAsk = Callable[[NamedVersions], bool]


def may_ask_all(_named: NamedVersions) -> bool:
    """For whom nothing is another's."""
    return True


class Index:
    """Names → versions, aliases → names. Every change is one assignment: a reader sees a name as it was or as it is.

    A mixture is kept as the alias that it is, and is found as a mixture alone.
    """

    def __init__(self) -> None:
        self._names: dict[str, NamedVersions] = {}
        self._gated: dict[str, NamedVersions] = {}
        self._aliases: dict[str, Alias] = {}

    def put(self, name: str, named: NamedVersions) -> None:
        self._names[name] = named
        if named.gate is not None:
            self._gated[name] = named
        else:
            self._gated.pop(name, None)

    def remove(self, name: str) -> None:
        self._names.pop(name, None)
        self._gated.pop(name, None)

    def put_alias(self, alias: Alias) -> None:
        self._aliases[alias.alias] = alias

    def remove_alias(self, alias: str) -> None:
        self._aliases.pop(alias, None)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def is_alias(self, name: str) -> bool:
        return self._find(name, is_mixture=False) is not None

    def is_mixture(self, name: str) -> bool:
        return self._find(name, is_mixture=True) is not None

    def all(self) -> list[NamedVersions]:
        """In order of name, as they are at one moment."""
        return [named for _, named in sorted(self._names.items())]

    def gated(self) -> list[NamedVersions]:
        """Those that have a gate."""
        return list(self._gated.values())

    def aliases(self) -> list[Alias]:
        """In order of alias."""
        return [alias for _, alias in sorted(self._aliases.items()) if alias.mixing is None]

    def mixtures(self) -> list[Alias]:
        """In order of name."""
        return [alias for _, alias in sorted(self._aliases.items()) if alias.mixing is not None]

    def num_aliases(self, tenant: str) -> int:
        """How many aliases and mixtures a tenant has."""
        return sum(tenant_of(alias) == tenant for alias in list(self._aliases))

    def names_of(self, digest: str) -> list[str]:
        """The names that have a version with this digest."""
        return [n.current.name for n in self.all() if any(record.digest == digest for record in n.versions)]

    def digests(self) -> frozenset[str]:
        """Of every version of every name."""
        return frozenset(record.digest for named in list(self._names.values()) for record in named.versions)

    def get(self, name: str) -> NamedVersions:
        """Raises AdapterNotFoundError."""
        found = self._names.get(name)
        if found is None:
            raise unknown(name)
        return found

    def alias(self, alias: str) -> Alias:
        """Raises AliasNotFoundError."""
        found = self._find(alias, is_mixture=False)
        if found is None:
            raise AliasNotFoundError(f"there is no alias called {alias[:128]!r}")
        return found

    def mixture(self, name: str) -> Alias:
        """Raises MixtureNotFoundError."""
        found = self._find(name, is_mixture=True)
        if found is None:
            raise MixtureNotFoundError(f"there is no mixture called {name[:128]!r}")
        return found

    def resolve(self, reference: str, client: str | None = None, may_ask: MayAsk = may_ask_all) -> VersionRecord:
        """The version that an alias or `name`, `base:name`, `name@3`, `name@sha256:<12 or more hex>` stands for.

        An alias that splits gives one `client` the same target each time. What one may not ask is as if it were not
        there. Raises AdapterNotFoundError and VersionNotFoundError; nothing else is ever tried instead.
        """
        while True:
            alias = self._find(reference.removeprefix("base:"), is_mixture=False)
            try:
                return self.resolve_name(reference if alias is None else choose(alias, client).reference, may_ask)
            except (AdapterNotFoundError, VersionNotFoundError):
                if self._find(reference.removeprefix("base:"), is_mixture=False) is alias:
                    raise  # else it was pointed elsewhere, and what it led to was deleted, between the two looks

    def resolve_name(self, reference: str, may_ask: MayAsk = may_ask_all) -> VersionRecord:
        """The same for what is no alias."""
        parsed = parse_reference(reference)
        named = self._names.get(parsed.name)
        if named is None or not may_ask(named):
            raise unknown(reference.removeprefix("base:").partition("@")[0])
        if parsed.version is None and parsed.digest is None:
            return named.current
        records = [record for record in named.versions if parsed.means(record)]
        if len({record.digest for record in records}) != 1:
            raise VersionNotFoundError(f"{reference[:200]!r} names no version, or more than one")
        return records[-1]

    def aliases_that_need(self, name: str, versions: Collection[int]) -> list[str]:
        """The aliases and mixtures, of whose it is, that would lead nowhere without these versions of `name`."""
        left = [record for record in self.get(name).versions if record.version not in versions]
        own = (alias for alias in list(self._aliases.values()) if tenant_of(alias.alias) == tenant_of(name))
        # most are of other names, which costs less to see than to take them apart
        near = ((alias.alias, t.reference) for alias in own for t in alias.targets if name in t.reference)
        references = ((alias, parse_reference(reference)) for alias, reference in near)
        found = {alias for alias, ref in references if ref.name == name and not any(map(ref.means, left))}
        return sorted(found)

    def _find(self, name: str, *, is_mixture: bool) -> Alias | None:
        found = self._aliases.get(name)
        return None if found is None or (found.mixing is not None) != is_mixture else found


def parse_reference(reference: str) -> Reference:
    """Raises AdapterNotFoundError for what no adapter can be called."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise unknown(reference)
    version = match["version"]
    return Reference(match["name"], None if version is None else int(version), match["digest"])


def unknown(reference: str) -> AdapterNotFoundError:
    """What a name that stands for nothing is answered with."""
    return AdapterNotFoundError(f"there is no adapter called {reference[:128]!r}")


def choose(alias: Alias, client: str | None) -> Target:
    """One of the targets. `client` names who asks; None draws anew each time.

    Weighted rendezvous hashing (Mosharaf et al., "Weighted rendezvous hashing", 2014): a client changes its target only
    as far as the weights do, so that raising a canary from 10 to 20 moves a tenth of the clients and nobody back.
    """
    if client is None:
        return random.choices(alias.targets, [target.weight for target in alias.targets])[0]
    return max(alias.targets, key=lambda target: _score(alias.alias, client, target))


def _score(alias: str, client: str, target: Target) -> float:
    """-weight / ln(u) for a u in (0, 1) that only alias, client and target's reference decide."""
    text = "\0".join((alias, client, target.reference)).encode("utf-8", "surrogatepass")
    drawn = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> (64 - _HASH_BITS)
    return -target.weight / math.log((drawn + 0.5) / 2**_HASH_BITS)
