"""Who is called what: the store's names and aliases, known in memory as well. Every change reaches the disk first."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swaplora_adapters.errors import (
    AdapterBusyError,
    AdapterFailedError,
    AdapterNotFoundError,
    GateFailedError,
    InvalidAdapterNameError,
    QuotaExceededError,
)
from swaplora_adapters.files.disk import raising_storage_errors
from swaplora_adapters.files.naming import tenant_of, validate_name
from swaplora_adapters.registry.changes import Changes
from swaplora_adapters.registry.copies import Copies
from swaplora_adapters.registry.index import Index, NamedVersions
from swaplora_adapters.store.conditions import UNCONDITIONAL, Conditions, NameState, TakenInError
from swaplora_adapters.store.records import (
    Alias,
    Canary,
    Details,
    Mixing,
    Published,
    Standing,
    Target,
    Touched,
    VersionRecord,
)
from swaplora_adapters.store.staging import Staging
from swaplora_adapters.store.store import Store

_NOTED = 16  # digests that are remembered of what a name was taken in from
MAX_ALIASES = 1000  # and mixtures of one tenant: all of them are gone through when a version is deleted or retired


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a gate has found of a version beside the one that was current."""

    gate: str
    version: int
    against: int  # the current version
    has_passed: bool
    verdict: Mapping[str, Any]  # JSON, with a `reason`


class Names:
    """Owns the index. Readers use `index` at any time; changes are made by `changes`, one after the other."""

    def __init__(
        self,
        store: Store,
        *,
        base_model: str,
        keep_versions: int,
        on_adopted: Callable[[Touched, set[VersionRecord]], None],
        reading: AbstractContextManager[object],
        wanted: Callable[[], AbstractContextManager[Mapping[str, float]]],
    ) -> None:
        """`on_adopted` hears what other servers have changed, and which versions are gone by that.

        What is `wanted` stays here: see `Copies`. Whoever binds names holds `reading`, and sees all that others have
        changed, or nothing of it.

        Raises InvalidAdapterNameError if something stored is called as the base is.
        """
        self.index = Index()
        self.changes = Changes(store, self._adopt)
        self.copies = Copies(store, self.changes, wanted)
        self._on_adopted = on_adopted
        self._reading = reading
        self._store = store
        self._base_model = base_model
        self._keep_versions = keep_versions
        for name in store.names():
            self._refresh(name)
        for alias in store.aliases():
            self.index.put_alias(alias)
        if base_model in self.index or self.index.is_alias(base_model) or self.index.is_mixture(base_model):
            raise InvalidAdapterNameError(
                f"an adapter, an alias or a mixture is stored as {base_model}, which is what the base is called; "
                "choose a --served-model-name"
            )
        self._origins = store.origins()
        self._folders = store.folders()

    def check_adapter_name(self, name: str) -> None:
        """Raise InvalidAdapterNameError for what an adapter cannot be called, or what something else is called.

        For whoever lets a name in: what is published under it may take long to come.
        """
        validate_name(name)
        self.check_is_free(name)

    def check_is_free(self, name: str) -> None:
        """Raise InvalidAdapterNameError for what the base, an alias or a mixture is called."""
        self.check_is_not_base(name)
        for kind, is_kind in (("an alias", self.index.is_alias), ("a mixture", self.index.is_mixture)):
            if is_kind(name):
                raise InvalidAdapterNameError(f"{name} is {kind}; choose another name, or delete that first")

    def check_is_not_base(self, name: str) -> None:
        """Raise InvalidAdapterNameError for what the base is called."""
        if name == self._base_model:
            raise InvalidAdapterNameError(f"{name} is what the base is called; choose another name")

    def check_is_own(self, _reference: str) -> None:
        """Raise NotOwnerError for an adapter that is another's; here there are no others."""

    def state(self, name: str) -> NameState:
        """What the name is now, to be compared with what it is when something that took long is to be published."""
        version = self.index.get(name).current.version if name in self.index else None
        return NameState(self.was_used(name), version)

    def publish(
        self,
        name: str,
        staging: Staging,
        details: Details,
        *,
        source: str,
        conditions: Conditions = UNCONDITIONAL,
    ) -> Published:
        """See `Store.publish`. Within a change that is made."""
        self.check_is_free(name)
        origin = self._origin_after(name, details.digest) if conditions.if_news else None
        published = self._store.publish(name, staging, details, source=source, conditions=conditions, origin=origin)
        for affected in {name, *self.index.names_of(details.digest)}:  # damaged files are whole again for all
            self._refresh(affected)
        self._origins.setdefault(name, None)  # only now: who finds a name used expects it in the index
        if origin is not None:
            self._origins[name] = origin
        return published

    def outdated(self, name: str) -> list[VersionRecord]:
        """Versions beyond those that are kept, without the current one and those that an alias leads to.

        As many are kept of those that may be current and of those that a gate holds back.
        """
        named = self.index.get(name)
        free = [record for record in named.versions if named.may_follow(record)]
        held = [record for record in named.versions if not named.may_follow(record)]
        oldest = [*free[: -self._keep_versions], *held[: -self._keep_versions]]
        return [r for r in oldest if r != named.current and not self.index.aliases_that_need(name, {r.version})]

    def change(
        self,
        name: str,
        *,
        current: int | None,
        is_pinned: bool | None,
        shared_with: Sequence[str] | None,
        is_forced: bool = False,
    ) -> NamedVersions:
        """Roll a name to another of its versions, pin it, share it, or all at once.

        Raises AdapterNotFoundError, VersionNotFoundError, and GateFailedError for a version that has not passed, unless
        it `is_forced`. Within a change that is made.
        """
        has_failed = current is not None and not self.may_follow(name, current)
        if has_failed and not is_forced:
            raise _held(self.index.resolve_name(f"{name}@{current}"))
        self._store.change(name, current=current, is_pinned=is_pinned, shared_with=shared_with, is_forced=has_failed)
        self._refresh(name)
        return self.index.get(name)

    def set_gate(self, name: str, gate: str | None, check: Callable[[], object]) -> NamedVersions:
        """Have new versions of `name` wait for a judgement, or no longer. Raises AdapterNotFoundError.

        And what `check` does, which is asked of what there is when the change is made.
        """

        def change() -> NamedVersions:
            self.index.get(name)
            check()
            self._store.set_gate(name, gate)
            self._refresh(name)
            return self.index.get(name)

        return self.changes.make(change)

    def is_due(self, name: str, found: Judgement) -> bool:
        """Whether it is of the gate, the version and the current version that there are now. Needs `changes`."""
        named = self.index.get(name) if name in self.index else None
        if named is None or named.gate != found.gate or named.current.version != found.against:
            return False
        return found.version in (record.version for record in named.candidates)

    def judge(self, name: str, found: Judgement, *, is_current: bool) -> None:
        """Note a judgement that is due, and let the name stand for the version if `is_current`. Needs `changes`."""
        standing = Standing.PASSED if found.has_passed else Standing.FAILED
        self._store.judge(name, found.version, standing, json.dumps(found.verdict), is_current=is_current)
        self._refresh(name)

    def may_follow(self, name: str, version: int) -> bool:
        """Whether it may be made current without force. Raises AdapterNotFoundError and VersionNotFoundError."""
        named = self.index.get(name)
        return version == named.current.version or named.may_follow(self.index.resolve_name(f"{name}@{version}"))

    def successor(self, name: str, version: int | None) -> VersionRecord | None:
        """What `name` would stand for without this version of it, or without any; AdapterNotFoundError."""
        named = self.index.get(name)
        if version != named.current.version:
            return None if version is None else named.current
        left = (record for record in reversed(named.versions) if record.version != version)
        return next((record for record in left if named.may_follow(record)), None)

    def remove(self, name: str, version: int | None) -> list[VersionRecord]:
        """Remove a name or one version of it, and return what was removed.

        Raises AdapterNotFoundError, VersionNotFoundError, and AdapterBusyError if an alias would then lead nowhere.
        Within a change that is made.
        """
        doomed = {record.version for record in self.index.get(name).versions} if version is None else {version}
        aliases = self.index.aliases_that_need(name, doomed)
        if aliases:
            kinds = ("mixture" if self.index.is_mixture(alias) else "alias" for alias in aliases)
            told = ", ".join(f"the {kind} {alias}" for kind, alias in zip(kinds, aliases, strict=True))
            raise AdapterBusyError(f"{told} leads there: point it elsewhere, or delete it, first")
        removed = self._store.delete(name, version)
        self._refresh(name)
        return removed

    def link_files(self, reference: str, folder: Path) -> VersionRecord:
        """Give a version's files a second place in `folder`, made on the store's disk, where no delete reaches them.

        An alias is unknown here: one that splits names no version. Raises AdapterNotFoundError, VersionNotFoundError,
        AdapterFailedError and StorageFullError.
        """
        record = self.index.resolve_name(reference)
        try:
            with self.copies.held(record.digest):
                self._store.verify(record.digest)
                with self.changes, raising_storage_errors():
                    self.index.resolve_name(f"{record.name}@{record.version}")  # which may be deleted by now
                    folder.mkdir()
                    for path in self._store.blob_paths(record.digest):
                        os.link(path, folder / path.name)
        except AdapterFailedError as error:
            raise AdapterFailedError(f"{record.name}@{record.version}: {error}") from error
        return record

    def put_alias(self, alias: str, targets: Sequence[Target], canary: Canary | None = None) -> Alias:
        """Make an alias, or point it elsewhere.

        Raises InvalidAdapterNameError, QuotaExceededError, and of a target AdapterNotFoundError, VersionNotFoundError.
        """

        def put() -> Alias:
            if self.index.is_mixture(alias):
                raise InvalidAdapterNameError(f"{alias} is a mixture; choose another alias, or delete that first")
            # a copy: whoever counts for a canary knows it by identity, and one that is put again is another
            return self._put(Alias(alias, tuple(targets), canary=canary and canary._replace()))

        return self.changes.make(put)

    def step_back(self, alias: str, canary: Canary, reason: str) -> bool:
        """Give a canary no more requests; False if the alias has another by now, or the same put again."""

        def step() -> bool:
            found = self.index.alias(alias) if self.index.is_alias(alias) else None
            if found is None or found.canary is not canary:
                return False
            targets = (t._replace(weight=0) if t.reference == canary.target else t for t in found.targets)
            stepped = canary._replace(stepped_back=time.time(), reason=reason)
            made = replace(found, targets=tuple(targets), canary=stepped)
            self._store.put_alias(made)
            self.index.put_alias(made)
            return True

        return self.changes.make(step)

    def put_mixture(self, name: str, members: Sequence[str], mixing: Mixing) -> tuple[Alias, bool]:
        """Make a mixture of names or versions, or change what it is made of; and whether it is the first of its name.

        Raises InvalidAdapterNameError, QuotaExceededError, and of a member AdapterNotFoundError, VersionNotFoundError.
        """

        def put() -> tuple[Alias, bool]:
            if self.index.is_alias(name):
                raise InvalidAdapterNameError(f"{name} is an alias; choose another name, or delete that first")
            is_first = not self.index.is_mixture(name)
            return self._put(Alias(name, tuple(Target(member, 1) for member in members), mixing)), is_first

        return self.changes.make(put)

    def _put(self, made: Alias) -> Alias:
        if made.alias == self._base_model or made.alias in self.index:
            raise InvalidAdapterNameError(f"{made.alias} is what the base or an adapter is called; choose another name")
        for target in made.targets:
            self.index.resolve_name(target.reference)
        is_new = not (self.index.is_alias(made.alias) or self.index.is_mixture(made.alias))
        if is_new and self.index.num_aliases(tenant_of(made.alias)) >= MAX_ALIASES:
            message = f"a tenant may have {MAX_ALIASES} aliases and mixtures, both together: delete one first"
            raise QuotaExceededError(message)
        self._store.put_alias(made)
        self.index.put_alias(made)
        return made

    def remove_alias(self, alias: str, check: Callable[[], None]) -> None:
        """Raises AliasNotFoundError, and what `check` does, which is asked of what there is when the change is made."""

        def remove() -> None:
            check()
            self._remove(self.index.alias(alias))

        self.changes.make(remove)

    def remove_mixture(self, name: str) -> None:
        """Raises MixtureNotFoundError."""
        self.changes.make(lambda: self._remove(self.index.mixture(name)))

    def _remove(self, made: Alias) -> None:
        self._store.remove_alias(made.alias)
        self.index.remove_alias(made.alias)

    def was_used(self, name: str) -> bool:
        """Whether there is or was an adapter of this name: what was deleted is not to come back by itself."""
        return name in self._origins or name in self.index

    def origin(self, name: str) -> str | None:
        """What the name was taken in from by itself, on any server: the last digests, the newest last."""
        return self._origins.get(name)

    def has_read(self, name: str, origin: str) -> bool:
        """Whether it was this that was last read of the name's folder here; earlier releases noted it as the origin."""
        return origin in (self._origins.get(name), self._folders.get(name, (None, None))[0])

    def set_read(self, name: str, origin: str, digest: str) -> None:
        """Note what was read of the name's folder here, and what that was known by."""
        self._store.put_folder(name, origin, digest)
        self._folders[name] = origin, digest

    def check_is_news(self, name: str, digest: str) -> None:
        """Raise TakenInError unless what was read of the name's folder here is to be taken in.

        Not what was the last here already, nor what another server has taken in after that: its folder is ahead of
        this one. With nothing read here before, nothing that any has taken in.
        """
        noted = self._noted(name)
        _, last = self._folders.get(name, ("", ""))
        if last in noted:
            noted = noted[noted.index(last) :]
        if digest in noted:
            raise TakenInError(name, digest)

    def _origin_after(self, name: str, digest: str) -> str:
        """The origin of a name once this was taken in."""
        noted = [each for each in self._noted(name) if each != digest]
        return " ".join([*noted, digest][-_NOTED:])

    def _noted(self, name: str) -> list[str]:
        return (self._origins.get(name) or "").split()

    def _adopt(self, touched: Touched) -> None:
        """Know what other servers have changed. Needs `changes`."""
        before = self._records(touched)
        names = {name: self._stored(name) for name in touched.names}
        aliases = {alias: next(iter(self._store.aliases(alias)), None) for alias in touched.aliases}
        for name in touched.names:
            self._origins |= self._store.origins(name)
        with self._reading:  # an alias may lead elsewhere, and what it led to be gone
            for name, named in names.items():
                self.index.put(name, named) if named else self.index.remove(name)
            for alias, made in aliases.items():
                self.index.put_alias(made) if made else self.index.remove_alias(alias)
        self._on_adopted(touched, before - self._records(touched))

    def _records(self, touched: Touched) -> set[VersionRecord]:
        """Of all versions of these names; what was found out about them is nothing here."""
        named = (self.index.get(name) for name in touched.names if name in self.index)
        return {replace(r, standing=None, verdict=None, failure=None) for each in named for r in each.versions}

    def _refresh(self, name: str) -> None:
        """Let the index know a name as the store does. Needs `changes`."""
        named = self._stored(name)
        self.index.put(name, named) if named else self.index.remove(name)

    def _stored(self, name: str) -> NamedVersions | None:
        try:
            versions, current = tuple(self._store.versions(name)), self._store.current(name)
        except AdapterNotFoundError:
            return None
        is_pinned, shared_with = self._store.is_pinned(name), self._store.shared_with(name)
        return NamedVersions(current, versions, is_pinned, shared_with, self._store.gate(name))


def _held(record: VersionRecord) -> GateFailedError:
    """Why a version may not be current."""
    reason = "it is not judged yet" if record.verdict is None else json.loads(record.verdict)["reason"]
    return GateFailedError(f"{record.name}@{record.version} has not passed the gate of {record.name}: {reason}")
