"""What all changes up to one came to: made of the log alone, so that whoever makes it makes the same.

    <id>/snapshots/<revision>-<id>     of a change and its id: none stands in the place of another history's

Earlier releases leave out the id, and so does what a store was founded with.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from swaplora_adapters.errors import StoreChangedError
from swaplora_adapters.store.manifests import Manifest
from swaplora_adapters.store.shared.history.entry import Entry, Kind, Position
from swaplora_adapters.store.shared.history.log import Log, TrimmedError
from swaplora_adapters.store.shared.objects import Objects
from swaplora_adapters.store.shared.trying import DamagedError, decoded, encoded, tried


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


class Chosen(NamedTuple):
    """The newest that can be read and are of the log, newest first, and what is wrong with those passed over."""

    snapshots: Sequence[Snapshot]
    complaints: Sequence[str]

    @property
    def newest(self) -> Snapshot:
        return self.snapshots[0]


class Snapshots:
    """Those of one shared store. Any thread may call; each raises StoreUnreachableError."""

    def __init__(self, objects: Objects, store_id: str, log: Log) -> None:
        self._objects, self._log = objects, log
        self._prefix = f"{store_id}/snapshots/"

    def last(self) -> Position:
        """After which change the newest one was made, as it is called, whatever is in it."""
        keys = self._keys()
        return self._position(keys[-1]) if keys else EMPTY.position

    def choose(self, count: int = 1) -> Chosen:
        """So many, each of another change; for those that there are not, what there was before all changes."""
        found, complaints, is_missing = list[Snapshot](), list[str](), True
        while is_missing and not found:  # newer ones may be there by now in the place of those that were
            complaints, is_missing = [], False
            for key in reversed(self._keys()):
                if len(found) == count:
                    break
                if found and self._position(key).revision == found[-1].revision:
                    continue
                if (content := tried(partial(self._objects.get, key))) is None:
                    is_missing = True
                    continue
                try:
                    found.append(self._trusted(content, key))
                except DamagedError:
                    complaints.append(f"{key} in the shared store is damaged")
                except StoreChangedError:
                    complaints.append(f"{key}, a snapshot in the shared store, is not of its log")
        return Chosen([*found, *[EMPTY] * count][:count], complaints)

    def put(self, snapshot: Snapshot, made_of: Snapshot = EMPTY) -> None:
        """Durable when this returns, also where one by its name is damaged; of older ones `made_of` alone is kept."""
        key, content = self._key(snapshot.position), _written(snapshot)
        if not tried(lambda: self._objects.create(key, content)) and self._is_damaged(key):
            self._objects.remove(key)
            tried(lambda: self._objects.create(key, content))
        for each in self._keys():
            revision = self._position(each).revision
            if revision <= snapshot.revision and each != key and revision != made_of.revision:
                self._objects.remove(each)

    def _trusted(self, content: bytes, key: str) -> Snapshot:
        """Raises DamagedError, and StoreChangedError for what is not of the log."""
        snapshot = _read(content, key)
        with suppress(TrimmedError):
            self._log.check(snapshot.position)
        return snapshot

    def _is_damaged(self, key: str) -> bool:
        content = tried(lambda: self._objects.get(key))
        try:
            if content is not None:
                _read(content, key)
        except DamagedError:
            return True
        return False

    def _keys(self) -> list[str]:
        return tried(lambda: [each.key for each in self._objects.under(self._prefix)])

    def _key(self, position: Position) -> str:
        name = f"{position.revision:020d}"
        return self._prefix + (name if position.id is None else f"{name}-{position.id}")

    def _position(self, key: str) -> Position:
        revision, _, change = key.removeprefix(self._prefix).partition("-")
        return Position(int(revision), change or None)


def _written(snapshot: Snapshot) -> bytes:
    """A line for each name and alias: no other thread waits long while one is made."""
    manifests = (*snapshot.names.items(), *snapshot.aliases.items())
    lines = ({"name": name, "revision": revision, "facts": facts} for name, (revision, facts) in manifests)
    return encoded({"revision": snapshot.revision, "id": snapshot.id, "num_names": len(snapshot.names)}, *lines)


def _read(content: bytes, key: str) -> Snapshot:
    told, *lines = decoded(content, key)
    if "names" in told:  # an earlier release's
        names, aliases = ({n: Manifest(*m) for n, m in told[kind].items()} for kind in ("names", "aliases"))
        return Snapshot(told["revision"], None, names, aliases)
    manifests = [(line["name"], Manifest(line["revision"], line["facts"])) for line in lines]
    num_names = told["num_names"]
    return Snapshot(told["revision"], told["id"], dict(manifests[:num_names]), dict(manifests[num_names:]))
