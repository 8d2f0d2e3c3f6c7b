"""Adapters' files in a shared store: in places that are written once, and taken away from under no version.

A version refers to a place that was made for it, or to one that a version before it refers to at that moment. A place
that nothing refers to any more is therefore never referred to again, and can be removed without asking anybody.

<id>/blobs/<digest>/<place>/    both files, and `damaged` where a server has found that they are, or are lost
"""

import json
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from swaplora_adapters.errors import AdapterFailedError, StoreUnreachableError
from swaplora_adapters.files.digest import hex_of
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.store.shared.objects import Listed, Objects
from swaplora_adapters.store.shared.trying import tried
from swaplora_adapters.store.staging import Staging

SWEPT_AFTER = 24 * 3600.0  # seconds: what is on its way in is published, and what was deleted fetched, long before
_DAMAGED = "damaged"


class SharedFiles:
    """Any thread may call; each raises StoreUnreachableError."""

    def __init__(self, objects: Objects, store_id: str) -> None:
        self._objects = objects
        self._prefix = f"{store_id}/blobs/"

    def send(self, digest: str, config: Path, weights: Path) -> str:
        """Both files to a new place, which this returns; durable then."""
        place = secrets.token_hex(8)
        self.mend(digest, place, config, weights)
        return place

    def take_back(self, digest: str, place: str) -> None:
        """Remove both from a place that no version refers to or will; what is left of them is swept."""
        with suppress(StoreUnreachableError):
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                self._objects.remove(self._key(digest, place, name))

    def mend(self, digest: str, place: str, config: Path, weights: Path) -> None:
        """Both files over what lies there, which has the same digest or is damaged; durable then."""
        for path, name in ((config, CONFIG_FILE), (weights, WEIGHTS_FILE)):
            tried(partial(self._objects.put, self._key(digest, place, name), path))

    def fetch(self, digest: str, place: str, staging: Staging) -> None:
        """Raises AdapterFailedError where they are not there, and StorageFullError."""
        for path in (staging.config_path, staging.weights_path):
            if not tried(partial(self._fetched, self._key(digest, place, path.name), path)):
                self.note_damage(digest, place)
                raise AdapterFailedError(f"the shared store has lost its {path.name}: upload it again")

    def note_damage(self, digest: str, place: str) -> None:
        """Have all servers know that these are to be sent again; where that cannot be noted, who asks next does."""
        with suppress(StoreUnreachableError):
            self._objects.create(self._key(digest, place, _DAMAGED), b"1")

    def has(self, digest: str, place: str) -> bool:
        """Whether both files lie there, and nobody has found them damaged."""
        prefix = self._key(digest, place, "")
        found = {each.key.removeprefix(prefix) for each in tried(lambda: self._objects.under(prefix))}
        return {CONFIG_FILE, WEIGHTS_FILE} <= found and _DAMAGED not in found

    def is_damaged(self, digest: str, place: str) -> bool:
        """Whether a server has found them so."""
        return tried(lambda: self._objects.get(self._key(digest, place, _DAMAGED))) is not None

    def forget_damage(self, digest: str, place: str) -> None:
        """They are mended; where that cannot be noted they are mended once more."""
        with suppress(StoreUnreachableError):
            self._objects.remove(self._key(digest, place, _DAMAGED))

    def listed(self) -> list[Listed]:
        """All that lie there."""
        return tried(lambda: self._objects.under(self._prefix))

    def sent(self, places: Mapping[str, str]) -> set[str]:
        """Those of these digests, each with its place, of which both files lie there."""
        keys = {each.key for each in self.listed()}
        return {
            d for d, place in places.items() if {self._key(d, place, n) for n in (CONFIG_FILE, WEIGHTS_FILE)} <= keys
        }

    def remove(self, listed: Sequence[Listed], referenced: Collection[tuple[str, str]], noted: Path) -> int:
        """All that lie in no place of these, (digest, place), and were found so long ago too; how many.

        Until then they may be on their way in, or be fetched for a request of before the last version was deleted. What
        was found, and when, outlasts a restart in the file `noted`. Both are by this server's clock: one that is set a
        day forward has what an earlier sweep has found be removed, and nothing else.
        """
        kept, now = {self._key(digest, place, "") for digest, place in referenced}, time.time()
        found = _found(noted)
        unreferenced = [each for each in listed if each.key[: each.key.rindex("/") + 1] not in kept]
        doomed = [e.key for e in unreferenced if e.key in found and min(now - found[e.key], e.age) > SWEPT_AFTER]
        for key in doomed:
            self._objects.remove(key)
        left = {each.key for each in unreferenced}.difference(doomed)
        with suppress(OSError):  # of a full disk: they are found anew
            noted.write_text(json.dumps({key: found.get(key, now) for key in sorted(left)}))
        return len(doomed)

    def _fetched(self, key: str, path: Path) -> bool:
        path.unlink(missing_ok=True)  # of a try that broke off
        return self._objects.fetch(key, path)

    def _key(self, digest: str, place: str, name: str) -> str:
        return f"{self._prefix}{hex_of(digest)}/{place}/{name}"


def _found(noted: Path) -> dict[str, float]:
    """Key → when a sweep first found that nothing refers to it, in seconds since the epoch."""
    try:
        return {str(key): float(at) for key, at in json.loads(noted.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # there was none, or it broke off
