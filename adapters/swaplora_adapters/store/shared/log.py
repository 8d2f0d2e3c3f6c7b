"""The log of changes: who makes its next object has made the next change, and nobody makes one twice."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from swaplora_adapters.errors import StoreUnreachableError
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.store.manifests import Facts, Manifest
from swaplora_adapters.store.shared.objects import Objects

FORMAT = 1
PAUSES = (0.05, 0.2)  # seconds between tries, one more than these
CHANGE = "change"  # in a manifest: the id of the entry that it is of
Kind = Literal["name", "alias"]
_KEPT_SNAPSHOTS = 2
T = TypeVar("T")


class Entry(NamedTuple):
    """One change: all that is kept of a name or an alias from its revision on."""

    revision: int
    kind: Kind
    name: str
    facts: Facts
    id: str | None = None  # that no other change has; None for what is of a snapshot

    @property
    def manifest(self) -> Manifest:
        """It says which change it is of, so that a server knows whether a store is still the one it is a copy of."""
        return Manifest(self.revision, self.facts if self.id is None else self.facts | {CHANGE: self.id})


class Snapshot(NamedTuple):
    """All that was kept of every name and alias after a change."""

    revision: int
    names: Mapping[str, Manifest]
    aliases: Mapping[str, Manifest]


class Log:
    """The changes of one shared store. Any thread may call; each raises StoreUnreachableError."""

    def __init__(self, objects: Objects, store_id: str) -> None:
        self._objects = objects
        self._log, self._snapshots = f"{store_id}/log/", f"{store_id}/snapshots/"

    def read(self, revision: int) -> Entry | None:
        """None if there is no such change yet."""
        content = tried(lambda: self._objects.get(_key(self._log, revision)))
        if content is None:
            return None
        told = _decoded(content, f"change {revision}")
        return Entry(told["revision"], told["kind"], told["name"], told["facts"], told["id"])

    def append(self, entry: Entry) -> bool:
        """Make a change the next one, durably; False if another was made in its place.

        After StoreUnreachableError it may still come to be: whoever reads on from there will see.
        """
        key, content = _key(self._log, entry.revision), _encoded(entry._asdict())
        # where it is there already it may be by a try whose answer was lost: the id tells
        return tried(lambda: self._objects.create(key, content) or self._objects.get(key) == content)

    def last_snapshot(self) -> int:
        """After which change the newest one was made; 0 if there is none."""
        keys = tried(lambda: [each.key for each in self._objects.under(self._snapshots)])
        return int(keys[-1].removeprefix(self._snapshots)) if keys else 0

    def newest_snapshot(self) -> Snapshot | None:
        """None if there is none."""
        keys = tried(lambda: [each.key for each in self._objects.under(self._snapshots)])
        for key in reversed(keys):
            if (content := tried(partial(self._objects.get, key))) is not None:
                told = _decoded(content, "a snapshot")
                names, aliases = ({n: Manifest(*m) for n, m in told[kind].items()} for kind in ("names", "aliases"))
                return Snapshot(told["revision"], names, aliases)
        return None

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Durable when this returns; of the older ones one is kept."""
        content = _encoded(snapshot._asdict())
        tried(lambda: self._objects.create(_key(self._snapshots, snapshot.revision), content))
        for each in self._objects.under(self._snapshots)[:-_KEPT_SNAPSHOTS]:
            self._objects.remove(each.key)


def tried(job: Callable[[], T]) -> T:
    """What `job` returns, which may be done more than once: a store that fails now and then is one that answers."""
    for pause in PAUSES:
        try:
            return job()
        except StoreUnreachableError:
            time.sleep(pause)
    return job()


def _key(prefix: str, revision: int) -> str:
    return f"{prefix}{revision:020d}"


def _encoded(told: Mapping[str, Any]) -> bytes:
    content = json.dumps({"format": FORMAT, **told}).encode()
    return b"%b\n%b\n" % (content, hashlib.sha256(content).hexdigest().encode())


def _decoded(raw: bytes, what: str) -> dict[str, Any]:
    content, _, checksum = raw.partition(b"\n")
    if checksum != hashlib.sha256(content).hexdigest().encode() + b"\n":
        raise StoreUnreachableError(f"{what} in the shared store is damaged: bring it back from a backup")
    told: dict[str, Any] = json.loads(content)
    if told["format"] > FORMAT:
        raise StoreError(f"{what} in the shared store was written by a newer release: start that one")
    return told
