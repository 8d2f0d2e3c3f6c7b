"""How a change becomes one of all that share the store: drafted here, made in the log, and then taken over from there.

What one server changes and what others have changed is taken over by the same steps.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from swaplora_adapters.errors import StorageFailedError, StorageFullError, StoreUnreachableError
from swaplora_adapters.store.blobs import Blobs
from swaplora_adapters.store.catalogue import Catalogue
from swaplora_adapters.store.journal import Journal, OutrunError
from swaplora_adapters.store.manifests import Manifest, Manifests
from swaplora_adapters.store.shared.history.entry import Entry, Kind, Position
from swaplora_adapters.store.shared.history.log import Log

T = TypeVar("T")
_AT_ONCE = 8  # manifests: more are written with one wait for the disk


class SharedJournal(Journal):
    """For one thread at a time."""

    def __init__(
        self, catalogue: Catalogue, names: Manifests, aliases: Manifests, blobs: Blobs, position: Position, log: Log
    ) -> None:
        """`position` is that of the last change up to which all are known."""
        super().__init__(catalogue, names, aliases, blobs, position.revision)
        self.position = position
        self._log = log
        self._draft: Entry | None = None

    @contextmanager
    def change(self) -> Iterator[None]:
        """Raises OutrunError, StoreUnreachableError, and StoreChangedError."""
        self._draft = None
        with self._catalogue.draft():
            yield
        self._make_draft()

    def _make_draft(self) -> None:
        if (entry := self._draft) is not None:
            if not self._log.append(entry):
                raise OutrunError
            try:
                self.adopt([entry])
            except (StorageFullError, StorageFailedError) as error:
                raise StoreUnreachableError(f"the change is made, but not known here yet: {error}") from error

    def even_if_full(self, change: Callable[[bool], T]) -> T:
        with self.change():
            return change(False)

    def adopt(self, entries: Sequence[Entry]) -> None:
        """Take over changes, in order; StorageFullError where even the reserve has no room for them."""
        newest = {(entry.kind, entry.name): entry for entry in entries}.values()
        in_order = sorted(newest, key=lambda entry: entry.revision)
        super().even_if_full(lambda _has_failed: self._take_over(in_order))
        self.position = in_order[-1].position
        self.revision = self.position.revision

    def _next_revision(self) -> int:
        return self.revision + 1

    def _left(self, name: str, removed: Sequence[str]) -> list[str]:
        """Whose files still lie here is nothing to others."""
        return []

    def _write(self, manifests: Manifests, name: str, manifest: Manifest, may_be_none: bool) -> None:
        kind: Kind = "name" if manifests is self._names else "alias"
        self._draft = Entry(manifest.revision, kind, name, manifest.facts, secrets.token_hex(16), self.position.id)

    def _take_over(self, entries: Sequence[Entry]) -> None:
        for kind, manifests in (("name", self._names), ("alias", self._aliases)):
            told = {entry.name: entry.manifest for entry in entries if entry.kind == kind}
            if len(told) > _AT_ONCE:
                manifests.put_all(told)
            else:
                for name, manifest in told.items():
                    manifests.put(name, manifest)
        had = self._catalogue.digests_of(entry.name for entry in entries if entry.kind == "name")
        for entry in entries:
            if entry.kind == "alias":
                self._catalogue.adopt_alias(entry.name, entry.manifest)
            elif entry.kind == "name":
                self._catalogue.adopt_name(entry.name, entry.manifest, {})
        self._catalogue.forget_unreferenced(had)
        self._catalogue.set_position(*entries[-1].position)
