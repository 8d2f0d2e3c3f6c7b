"""Which changes are no more in the log: whole segments of it, of which the ids stay.

    <id>/trimmed/<segment>         the id of each of its changes, by revision

It is made before the first of them is removed, and stays. So where there is none of a segment, an object of the log
that is not there was never there; and whether a change was ever made can be told for good.
"""

from collections.abc import Mapping

from swaplora_adapters.store.shared.objects import Objects
from swaplora_adapters.store.shared.trying import decoded, encoded, tried

SEGMENT = 256  # changes; one of them ends with each revision that this divides


def segment_of(revision: int) -> int:
    """Which one this change is in, from 0."""
    return (revision - 1) // SEGMENT


def end_of(segment: int) -> int:
    """Its last change."""
    return (segment + 1) * SEGMENT


class Segments:
    """Those of one store. Any thread may call; each raises StoreUnreachableError."""

    def __init__(self, objects: Objects, store_id: str) -> None:
        self._objects = objects
        self._prefix = f"{store_id}/trimmed/"

    def ids(self, revision: int) -> Mapping[int, str] | None:
        """Of all changes in the segment that this one is in, if it is trimmed."""
        content = tried(lambda: self._objects.get(self._key(revision)))
        if content is None:
            return None
        [told] = decoded(content, "what is known of removed changes")
        return {int(each): change for each, change in told["ids"].items()}

    def mark(self, ids: Mapping[int, str]) -> None:
        """Durable when this returns; all who do it say the same."""
        key, content = self._key(min(ids)), encoded({"ids": {str(each): change for each, change in ids.items()}})
        tried(lambda: self._objects.create(key, content))

    def _key(self, revision: int) -> str:
        return f"{self._prefix}{segment_of(revision):020d}"
