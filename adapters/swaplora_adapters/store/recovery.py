"""What a start makes of what it finds: catalogue and manifests brought to agree, nothing unknown thrown away.

Of the two the newer is right, name by name. A catalogue that is lost or damaged is set aside, and made anew from the
manifests.
"""

import os
from collections.abc import Mapping
from typing import Any

from swaplora_adapters.errors import StorageFailedError, StorageFullError
from swaplora_adapters.files.disk import StoreError, sync_folder
from swaplora_adapters.store.blobs import Blobs
from swaplora_adapters.store.catalogue import Catalogue, DamagedCatalogueError
from swaplora_adapters.store.data_dir import DataDir
from swaplora_adapters.store.manifests import Manifest, Manifests

_BESIDE = ("-wal", "-shm", "-journal", "")  # the catalogue itself last: until it is gone, the next start does all again


class Recovery:
    """One start's. `notes` say what was not as it should be, a line each; with none of it `is_sound`."""

    def __init__(self, folders: DataDir, blobs: Blobs, names: Manifests, aliases: Manifests) -> None:
        """Raises StoreError for files that a newer release has described."""
        self._folders = folders
        self._blobs = blobs
        self._names, self._aliases = names, aliases
        self._described_names, damaged_names = names.read()
        self._described_aliases, damaged_aliases = aliases.read()
        self._damaged = [*damaged_names, *damaged_aliases]
        self.notes: list[str] = []
        self.is_sound = not self._damaged

    def open_catalogue(self) -> Catalogue:
        """The catalogue, or where that is lost or damaged a new one; StoreError if nothing says what it held."""
        path = self._folders.catalogue
        is_lost = not path.exists() or not path.stat().st_size
        has_files = self._folders.has_manifests or not self._blobs.is_empty()
        try:
            if is_lost and has_files:
                raise DamagedCatalogueError(f"{path.name} is empty" if path.exists() else f"{path.name} is missing")
            catalogue = Catalogue(path)
        except DamagedCatalogueError as error:
            self._set_catalogue_aside(error)
            catalogue = Catalogue(path)
        sync_folder(path.parent)
        return catalogue

    def agree(self, catalogue: Catalogue, *, is_copy: bool = False) -> int:
        """Bring the catalogue and the manifests to say the same; the last revision of any name or alias.

        Who is called what in a data directory that `is_copy` of a shared store is for that to say.
        """
        self._folders.make_manifest_folders()
        self._set_damaged_aside()
        names = _Difference(catalogue.revisions(), self._described_names)
        aliases = _Difference(catalogue.alias_revisions(), self._described_aliases)
        if names.news or aliases.news:
            with catalogue.transaction():
                for name, manifest in names.news.items():
                    digests = (version["digest"] for version in manifest.facts["versions"])
                    sizes = {digest: self._blobs.config_bytes(digest) for digest in digests}
                    catalogue.adopt_name(name, manifest, sizes)
                for alias, manifest in aliases.news.items():
                    catalogue.adopt_alias(alias, manifest)
                catalogue.forget_unreferenced()
            told = f"{len(names.news)} names and {len(aliases.news)} aliases"
            self.notes.append(f"the catalogue was brought up to date from the files beside it: {told}")
        untold = set(aliases.untold) - (set() if is_copy else self._set_namesakes_aside(catalogue))
        self._write(self._names, {name: catalogue.manifest_of_name(name) for name in names.untold})
        self._write(self._aliases, {alias: catalogue.manifest_of_alias(alias) for alias in untold})
        return max(names.last_revision, aliases.last_revision)

    def told_at(self, revision: int, fact: str) -> Any:
        """What a manifest of this change was found to say of something; None if none does."""
        described = (*self._described_names.values(), *self._described_aliases.values())
        told = (
            manifest.facts[fact] for manifest in described if manifest.revision == revision and fact in manifest.facts
        )
        return next(told, None)

    def sweep(self, catalogue: Catalogue, *, is_copy: bool = False) -> None:
        """Remove what was on its way in or was deleted; what nobody knows is set aside, unless it `is_copy` of all."""
        removed = catalogue.removed() if self.is_sound else ()
        if is_copy:
            removed = self._blobs.digests()
        num_unknown = self._blobs.sweep([digest for digest, *_ in catalogue.blobs()], removed)
        if num_unknown:
            self.notes.append(f"{num_unknown} folders of files that no adapter has were set aside in the quarantine")

    def _set_catalogue_aside(self, error: DamagedCatalogueError) -> None:
        """All its files: what it was not the latest to know may be in its log."""
        if not (self._folders.has_manifests or self._blobs.is_empty()):
            raise _nothing_to_go_by(str(error)) from error
        catalogue = self._folders.catalogue
        files = [path for end in _BESIDE if os.path.lexists(path := catalogue.with_name(catalogue.name + end))]
        self.is_sound = False
        self.notes.append(f"{error}: it is made anew from what the files of the adapters say")
        if files:
            aside = self._folders.place_aside("catalogue")
            aside.mkdir(mode=0o700)
            for path in files:
                path.rename(aside / path.name)
            self.notes[-1] += f", and what was there is in the quarantine as {aside.name}"

    def _set_damaged_aside(self) -> None:
        for path in self._damaged:
            aside = self._folders.set_aside(path, f"{path.parent.name}-{path.name}")
            self.notes.append(f"the description of {path.name!a} is damaged, and in the quarantine as {aside.name!a}")

    def _set_namesakes_aside(self, catalogue: Catalogue) -> set[str]:
        """Mixtures that are called as an adapter is, which an earlier release made that knows no mixtures."""
        found = catalogue.alias_revisions().keys() & set(catalogue.names())
        for name in sorted(found):
            path, told = self._aliases.path(name), ""
            if path.exists():
                told = f": it is in the quarantine as {self._folders.set_aside(path, f'aliases-{path.name}').name!a}"
            self.notes.append(f"the mixture or alias {name!a} is called as an adapter is, which keeps the name{told}")
        if found:
            with catalogue.transaction():
                for name in found:
                    catalogue.remove_alias(name)
        return found

    def _write(self, manifests: Manifests, missing: Mapping[str, Manifest]) -> None:
        """A disk without room for them leaves them to the next start."""
        try:
            manifests.put_all(missing)
        except (StorageFullError, StorageFailedError) as error:
            self.notes.append(f"{len(missing)} names or aliases are described in the catalogue alone: {error}")


def _is_gone(manifest: Manifest) -> bool:
    """Whether it is an alias's or a mixture's that was deleted."""
    return manifest.facts.get("targets", ()) is None and manifest.facts.get("mixture") is None


class _Difference:
    """What manifests tell that the catalogue has not heard of, and of what it knows more than they tell."""

    def __init__(self, revisions: Mapping[str, int], described: Mapping[str, Manifest]) -> None:
        """`revisions` are the catalogue's. An alias that was deleted is known to it by its absence."""
        told = {name: manifest.revision for name, manifest in described.items()}
        gone = {n for n, d in described.items() if n not in revisions and _is_gone(d)}
        self.news = {n: d for n, d in described.items() if n not in gone and d.revision > revisions.get(n, -1)}
        self.untold = [name for name, revision in revisions.items() if revision > told.get(name, -1)]
        self.last_revision = max([0, *revisions.values(), *told.values()])


def _nothing_to_go_by(reason: str) -> StoreError:
    return StoreError(
        f"{reason}, and the stored adapters, which an earlier release wrote, do not say what they are called: "
        "bring the catalogue back, or move the folder blobs away"
    )
