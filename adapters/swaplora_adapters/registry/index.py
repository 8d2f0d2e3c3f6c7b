"""What each name stands for, in memory: looked at for every request, so never behind a disk."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from swaplora_adapters.artifact.records import VersionRecord
from swaplora_adapters.errors import AdapterNotFoundError, VersionNotFoundError

_REFERENCE = re.compile(
    r"(?:base:)?(?P<name>[^@:]+)(?:@(?:(?P<version>[1-9][0-9]{0,8})|sha256:(?P<digest>[0-9a-f]{12,64})))?"
)


@dataclass(frozen=True, slots=True)
class NamedVersions:
    """One name's versions, oldest first, and the one it stands for."""

    current: VersionRecord
    versions: tuple[VersionRecord, ...]


class Index:
    """Name → versions. Every change is one assignment, so a reader sees a name as it was or as it is."""

    def __init__(self) -> None:
        self._names: dict[str, NamedVersions] = {}

    def put(self, name: str, versions: Sequence[VersionRecord], current: VersionRecord) -> None:
        self._names[name] = NamedVersions(current, tuple(versions))

    def remove(self, name: str) -> None:
        self._names.pop(name, None)

    def all(self) -> list[NamedVersions]:
        """In order of name, as they are at one moment."""
        return [named for _, named in sorted(self._names.items())]

    def digests(self) -> frozenset[str]:
        """Of every version of every name."""
        return frozenset(record.digest for named in list(self._names.values()) for record in named.versions)

    def get(self, name: str) -> NamedVersions:
        """Raises AdapterNotFoundError."""
        found = self._names.get(name)
        if found is None:
            raise AdapterNotFoundError(f"there is no adapter called {name[:128]!r}; GET /v1/adapters lists them")
        return found

    def resolve(self, reference: str) -> VersionRecord:
        """The version that `name`, `base:name`, `name@3` or `name@sha256:<12 or more hex>` stands for.

        Raises AdapterNotFoundError and VersionNotFoundError; nothing else is ever tried instead.
        """
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise AdapterNotFoundError(f"there is no adapter called {reference[:128]!r}; GET /v1/adapters lists them")
        named = self.get(match["name"])
        if match["version"] is None and match["digest"] is None:
            return named.current
        return _only(reference, [record for record in named.versions if _is_meant(match, record)])


def _is_meant(match: re.Match[str], record: VersionRecord) -> bool:
    if match["version"] is not None:
        return record.version == int(match["version"])
    return record.digest.startswith(f"sha256:{match['digest']}")


def _only(reference: str, records: list[VersionRecord]) -> VersionRecord:
    """The newest of `records` if all have one digest."""
    if len({record.digest for record in records}) != 1:
        raise VersionNotFoundError(f"{reference[:200]!r} names no version, or more than one")
    return records[-1]
