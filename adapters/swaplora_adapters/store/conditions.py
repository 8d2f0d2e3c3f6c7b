"""What a sender may want to hold of a name at the moment that something is published under it."""

from dataclasses import dataclass
from typing import NamedTuple

from swaplora_adapters.errors import PreconditionFailedError, VersionMismatchError
from swaplora_adapters.store.records import VersionRecord


class NameState(NamedTuple):
    """A name at one moment."""

    was_used: bool
    version: int | None  # the current one, if there is any


class TakenInError(PreconditionFailedError):
    """What was read of a name's folder is no news."""

    def __init__(self, name: str, digest: str) -> None:
        super().__init__(f"{name} was taken in before")
        self.digest = digest


@dataclass(frozen=True, slots=True)
class Conditions:
    """Without any of them whatever the name stands for is replaced."""

    if_match: str | None = None  # the digest of the current version, or "*" for any
    if_none_match: bool = False  # the name is unused
    if_unchanged_since: NameState | None = None
    if_news: bool = False  # its digest was not taken in before, which is noted with the version

    def check(self, name: str, was_used: bool, current: VersionRecord | None) -> None:
        """Raise PreconditionFailedError if one of them does not hold for the name as it is now."""
        state = NameState(was_used, None if current is None else current.version)
        if self.if_unchanged_since not in (None, state):
            raise PreconditionFailedError(f"{name} was changed in the meantime")
        if self.if_none_match and current is not None:
            raise PreconditionFailedError(f"adapter {name} exists already")
        if self.if_match is not None and (current is None or self.if_match not in ("*", current.digest)):
            raise VersionMismatchError("the adapter's current version is not the one that was to be replaced")


UNCONDITIONAL = Conditions()
