"""What all changes up to one came to: made of the log alone, so that whoever makes it makes the same."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

from swaplora_adapters.store.manifests import Manifest
from swaplora_adapters.store.shared.history.entry import Entry, Kind, Position
from swaplora_adapters.store.shared.objects import Objects
from swaplora_adapters.store.shared.trying import decoded, encoded, tried

_KEPT = 2


class Snapshot(NamedTuple):
    """All that was kept of every name and alias after a change."""

    revision: int
    id: str | None  # of that change; None where the store was founded with all this
    names: Mapping[str, Manifest]
    aliases: Mapping[str, Manifest]

    @property
    def position(self) -> Position:
        return Position(self.revision, self.id)

    def replayed(self, entries: Iterable[Entry]) -> "Snapshot":
        """The same after these changes, which follow it."""
        names, aliases, last = dict(self.names), dict(self.aliases), (self.revision, self.id)
        for entry in entries:
            (names if entry.kind == "name" else aliases)[entry.name] = entry.manifest
            if entry.is_removal:
                del aliases[entry.name]
            last = (entry.revision, entry.id)
        return Snapshot(*last, names, aliases)

    def since(self, revision: int, aliases: Iterable[str]) -> list[Entry]:
        """What brings whoever knows all up to that change, and these aliases, to know this; the last says the revision.

        After 0 that is all, also what earlier releases have counted no changes of.
        """
        kinds: tuple[tuple[Kind, Mapping[str, Manifest]], ...] = (("name", self.names), ("alias", self.aliases))
        entries = [
            Entry(manifest.revision, kind, name, manifest.facts)
            for kind, manifests in kinds
            for name, manifest in manifests.items()
            if revision == 0 or manifest.revision > revision
        ]
        entries += [Entry.removal(self.revision, alias) for alias in aliases if alias not in self.aliases]
        return [*entries, Entry(self.revision, "none", "", {}, self.id)]


EMPTY = Snapshot(0, None, {}, {})


class Snapshots:
    """Those of one shared store. Any thread may call; each raises StoreUnreachableError."""

    def __init__(self, objects: Objects, store_id: str) -> None:
        self._objects = objects
        self._prefix = f"{store_id}/snapshots/"

    def last_revision(self) -> int:
        """After which change the newest one was made; 0 if there is none."""
        keys = self._keys()
        return self._revision(keys[-1]) if keys else 0

    def newest(self) -> Snapshot:
        """What there was before all changes, if there is none."""
        while keys := self._keys():
            for key in reversed(keys):
                if (content := tried(partial(self._objects.get, key))) is not None:
                    return _read(content)
        return EMPTY  # only if none is listed: newer ones may be there by now in the place of those that were

    def put(self, snapshot: Snapshot) -> None:
        """Durable when this returns; of the older ones one is kept."""
        key = f"{self._prefix}{snapshot.revision:020d}"
        tried(lambda: self._objects.create(key, _written(snapshot)))
        for each in self._keys()[:-_KEPT]:
            self._objects.remove(each)

    def _keys(self) -> list[str]:
        return tried(lambda: [each.key for each in self._objects.under(self._prefix)])

    def _revision(self, key: str) -> int:
        return int(key.removeprefix(self._prefix))


def _written(snapshot: Snapshot) -> bytes:
    """A line for each name and alias: no other thread waits long while one is made."""
    manifests = (*snapshot.names.items(), *snapshot.aliases.items())
    lines = ({"name": name, "revision": revision, "facts": facts} for name, (revision, facts) in manifests)
    return encoded({"revision": snapshot.revision, "id": snapshot.id, "num_names": len(snapshot.names)}, *lines)


def _read(content: bytes) -> Snapshot:
    told, *lines = decoded(content, "a snapshot")
    if "names" in told:  # an earlier release's
        names, aliases = ({n: Manifest(*m) for n, m in told[kind].items()} for kind in ("names", "aliases"))
        return Snapshot(told["revision"], None, names, aliases)
    manifests = [(line["name"], Manifest(line["revision"], line["facts"])) for line in lines]
    num_names = told["num_names"]
    return Snapshot(told["revision"], told["id"], dict(manifests[:num_names]), dict(manifests[num_names:]))
