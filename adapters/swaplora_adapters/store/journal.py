"""How a change of what is kept becomes durable: catalogue and manifests together, or not at all."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from swaplora_adapters.errors import StorageFailedError, StorageFullError
from swaplora_adapters.store.blobs import Blobs
from swaplora_adapters.store.catalogue import Catalogue
from swaplora_adapters.store.manifests import Manifest, Manifests
from swaplora_adapters.store.records import Alias

T = TypeVar("T")


class OutrunError(Exception):
    """Another server has made the next change: this one is to be made again, of what there is then."""


class NotSentError(Exception):
    """Files are to lie where all servers find them before a change speaks of them."""


class Journal:
    """For one thread at a time: the store's lock sees to that. `revision` is that of the last change of anything."""

    def __init__(self, catalogue: Catalogue, names: Manifests, aliases: Manifests, blobs: Blobs, revision: int) -> None:
        self._catalogue = catalogue
        self._names, self._aliases = names, aliases
        self._blobs = blobs
        self.revision = revision

    def change(self) -> AbstractContextManager[None]:
        """Changes of the catalogue, and of one manifest at the body's end, all or none; durable when it ends."""
        return self._committed()

    def even_if_full(self, change: Callable[[bool], T]) -> T:
        """What `change` returns, in a transaction that takes its room from the reserve if the disk has none left.

        `change` is told whether it has failed once, and may make do with less.
        """
        try:
            with self._committed():
                return change(False)
        except (StorageFullError, StorageFailedError):
            self._blobs.free_reserve()
            with self._committed():
                return change(True)

    def write_name(self, name: str, removed: Sequence[str] = (), *, may_be_none: bool = False) -> None:
        """Write down what the catalogue has of a name that has changed, before that is committed.

        `removed` are digests that it has lost. What was removed on purpose is not set aside at the next start.
        """
        self._catalogue.set_revision(name, self._next_revision(), self._left(name, removed))
        self._write(self._names, name, self._catalogue.manifest_of_name(name), may_be_none)

    def put_alias(self, alias: Alias) -> None:
        """Make an alias, or let it stand for something else."""
        self._catalogue.put_alias(alias, self._next_revision())
        self._write(self._aliases, alias.alias, self._catalogue.manifest_of_alias(alias.alias), may_be_none=False)

    def remove_alias(self, alias: str, *, may_be_none: bool) -> bool:
        """Whether there was one."""
        is_removed = self._catalogue.remove_alias(alias)
        if is_removed:
            self._write(self._aliases, alias, Manifest(self._next_revision(), {"targets": None}), may_be_none)
        return is_removed

    @contextmanager
    def _committed(self) -> Iterator[None]:
        with self._names.undone_on_error(), self._aliases.undone_on_error(), self._catalogue.transaction():
            yield

    def _next_revision(self) -> int:
        self.revision += 1
        return self.revision

    def _left(self, name: str, removed: Sequence[str]) -> list[str]:
        """Digests that the name has lost, whose files are still there."""
        return [d for d in dict.fromkeys([*self._catalogue.removed(name), *removed]) if self._blobs.has(d)]

    def _write(self, manifests: Manifests, name: str, manifest: Manifest, may_be_none: bool) -> None:
        """Where what is no more cannot be described as such, no manifest at all says so too, if that `may_be_none`."""
        try:
            manifests.put(name, manifest)
        except (StorageFullError, StorageFailedError):
            if not may_be_none:
                raise
            manifests.take_away(name)
