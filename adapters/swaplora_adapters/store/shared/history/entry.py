"""One change of a shared store, and where in the row of them a server is."""

from typing import Literal, NamedTuple

from swaplora_adapters.store.manifests import Facts, Manifest

CHANGE = "change"  # in a manifest: the id of the entry that it is of
Kind = Literal["name", "alias", "none"]  # the last only where a snapshot is taken over: that all up to it is known


class Position(NamedTuple):
    """The last change that is known somewhere."""

    revision: int
    id: str | None  # None where it is not known, or the store was founded with it


class Entry(NamedTuple):
    """One change: all that is kept of a name or an alias from its revision on."""

    revision: int
    kind: Kind
    name: str
    facts: Facts
    id: str | None = None  # that no other change has; None for what is of a snapshot
    after: str | None = None  # the id of the change before it; None where that has none, and of earlier releases

    @classmethod
    def removal(cls, revision: int, alias: str) -> "Entry":
        """That an alias is no more."""
        return cls(revision, "alias", alias, {"targets": None})

    @property
    def is_removal(self) -> bool:
        """Whether nothing is kept from it on; a name is kept, since its versions never start again."""
        return self.kind == "alias" and self.facts["targets"] is None and self.facts.get("mixture") is None

    @property
    def before(self) -> Position:
        """Where whoever makes it is."""
        return Position(self.revision - 1, self.after)

    def follows(self, position: Position) -> bool:
        """Whether it says so of itself; what has no id is compared with nothing."""
        return position.id in (None, self.after)

    @property
    def position(self) -> Position:
        return Position(self.revision, self.id)

    @property
    def manifest(self) -> Manifest:
        """It says which change it is of, so that a server knows whether a store is still the one it is a copy of."""
        return Manifest(self.revision, self.facts if self.id is None else self.facts | {CHANGE: self.id})
