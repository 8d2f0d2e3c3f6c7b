"""Three tenants who put, share, alias, delete and ask in any order, against a model made of dicts.

Whatever they do, nobody is told of, or given, what he may not ask.
"""

import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run

import adapter_files
from soak import size
from swaplora_adapters.errors import (
    AdapterBusyError,
    AdapterNotFoundError,
    NotOwnerError,
    VersionNotFoundError,
)
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.registry.tenant import TenantRegistry
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.store.records import Target
from swaplora_adapters.store.staging import FILE_NAMES
from swaplora_adapters.store.store import Store

TENANTS = ("default", "a", "b-a")
NAMES = ("x", "y")
WHOSE = st.sampled_from(TENANTS)
NAME = st.sampled_from(NAMES)
NUM_CONTENTS = 3


@dataclass
class Named:
    """What the model knows of an adapter."""

    contents: dict[int, int]  # by version
    current: int
    shared_with: frozenset[str] = frozenset()


@dataclass
class Model:
    """Adapters by owner and name, aliases by owner, and the last version that a name ever had."""

    adapters: dict[tuple[str, str], Named] = field(default_factory=dict)
    aliases: dict[str, tuple[str, str, int | None]] = field(default_factory=dict)  # one for each tenant: `z`
    last: dict[tuple[str, str], int] = field(default_factory=dict)

    def seen(self, tenant: str, owner: str, name: str) -> Named | None:
        named = self.adapters.get((owner, name))
        if named is None or not (owner == tenant or named.shared_with & {tenant, "*"}):
            return None
        return named

    def listed(self, tenant: str) -> list[str]:
        return sorted(said(tenant, owner, name) for owner, name in self.adapters if self.seen(tenant, owner, name))


def said(tenant: str, owner: str, name: str) -> str:
    return name if owner == tenant else f"{owner}~{name}"


class Machine(RuleBasedStateMachine):
    """Every rule does to the registry and to the model the same, and expects the same of both."""

    folders: list[Path]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.model = Model()
        self.digests: dict[int, str] = {}
        self.open()

    def open(self) -> None:
        self.registry = Registry(
            Store(Path(self.folder.name)),
            sources=Sources(allowed=(), folder=None, max_weights_bytes=0),
            layers=adapter_files.LAYERS,
            dtype=torch.float32,
            memory_budget=1 << 30,
            wait_seconds=30,
            keep_versions=2,
            base_model="base",
        )
        self.of = {each: TenantRegistry(self.registry, "" if each == "default" else each) for each in TENANTS}

    def teardown(self) -> None:
        self.registry.close()
        self.folder.cleanup()

    @rule(owner=WHOSE, name=NAME, content=st.integers(0, NUM_CONTENTS - 1))
    def put(self, owner: str, name: str, content: int) -> None:
        with self.of[owner].stage() as staging:
            for part, file in FILE_NAMES.items():
                with staging.writer(part, 1 << 20) as writer:
                    writer.write((self.folders[content] / file).read_bytes())
            card = self.of[owner].put(name, staging, source="upload").card
        self.digests[content] = card.record.digest
        key = owner, name
        named = self.model.adapters.get(key)
        if named is None or named.contents[named.current] != content:
            version = self.model.last[key] = self.model.last.get(key, 0) + 1
            named = Named({}, version) if named is None else named
            named.contents[version] = content
            named.current = version
            self.model.adapters[key] = named
        needed = self.needed(owner, name)
        for old in sorted(named.contents)[:-2]:
            if old not in {named.current, needed}:
                del named.contents[old]

    def needed(self, owner: str, name: str) -> int | None:
        """The version of it that the owner's alias leads to."""
        alias = self.model.aliases.get(owner)
        return alias[2] if alias is not None and alias[:2] == (owner, name) else None

    @rule(owner=WHOSE, name=NAME, tenants=st.sets(WHOSE) | st.just({"*"}))
    def share(self, owner: str, name: str, tenants: set[str]) -> None:
        named = self.model.adapters.get((owner, name))
        if named is None:
            with pytest.raises(AdapterNotFoundError):
                self.of[owner].change(name, shared_with=sorted(tenants))
        else:
            self.of[owner].change(name, shared_with=sorted(tenants))
            named.shared_with = frozenset(tenants)

    @rule(owner=WHOSE, name=NAME)
    def delete(self, owner: str, name: str) -> None:
        if (owner, name) not in self.model.adapters:
            with pytest.raises(AdapterNotFoundError):
                self.of[owner].delete(name)
        elif self.model.aliases.get(owner, ())[:2] == (owner, name):
            with pytest.raises(AdapterBusyError):
                self.of[owner].delete(name)
        else:
            self.of[owner].delete(name).freed.result(60)
            del self.model.adapters[owner, name]

    @rule(tenant=WHOSE, owner=WHOSE, name=NAME, version=st.none() | st.integers(1, 3))
    def alias(self, tenant: str, owner: str, name: str, version: int | None) -> None:
        reference = f"{owner}~{name}" + ("" if version is None else f"@{version}")
        named = self.model.seen(tenant, owner, name)
        if named is None or not (version is None or version in named.contents):
            with pytest.raises(VersionNotFoundError if named else AdapterNotFoundError):
                self.of[tenant].put_alias("z", [Target(reference, 1)])
        else:
            self.of[tenant].put_alias("z", [Target(reference, 1)])
            self.model.aliases[tenant] = (owner, name, version)

    @rule(tenant=WHOSE)
    def delete_alias(self, tenant: str) -> None:
        if self.model.aliases.pop(tenant, None):
            self.of[tenant].delete_alias("z")

    @rule(tenant=WHOSE, owner=WHOSE, name=NAME)
    def take_what_is_anothers(self, tenant: str, owner: str, name: str) -> None:
        """What its owner alone may do, another is refused: by its name where he may ask it, else as of nobody's."""
        if owner == tenant:
            return
        refused = NotOwnerError if self.model.seen(tenant, owner, name) else AdapterNotFoundError
        reference, of = f"{owner}~{name}", self.of[tenant]
        with pytest.raises(refused):
            of.delete(reference)
        with pytest.raises(refused):
            of.change(reference, shared_with=["*"])
        with pytest.raises(refused):
            of.change(reference, is_pinned=True)
        with pytest.raises(refused):
            of.names.link_files(reference, Path(self.folder.name) / "copy")

    @rule()
    def restart(self) -> None:
        self.registry.close()
        self.open()

    @invariant()
    def each_is_told_of_what_he_may_ask(self) -> None:
        for tenant, of in self.of.items():
            listed = self.model.listed(tenant)
            assert [card.record.name for card in of.cards()] == listed
            assert [named.current.name for named in of.names.index.all()] == listed
            assert [alias.alias for alias in of.names.index.aliases()] == (
                ["z"] if tenant in self.model.aliases else []
            )

    @invariant()
    def each_is_answered_by_what_he_may_ask(self) -> None:
        for tenant in TENANTS:
            for owner in TENANTS:
                for name in NAMES:
                    named = self.model.seen(tenant, owner, name)
                    content = None if named is None else named.contents[named.current]
                    for reference in {f"{owner}~{name}", said(tenant, owner, name), f"base:{owner}~{name}"}:
                        self.check(tenant, reference, content, said(tenant, owner, name))
                    for version in (1, 2):
                        content = None if named is None else named.contents.get(version)
                        self.check(tenant, f"{owner}~{name}@{version}", content, said(tenant, owner, name))
                self.check(tenant, f"{owner}~z", None, "")  # another's alias, or one's own by a name that it has not
            if tenant in self.model.aliases:
                owner, name, of_alias = self.model.aliases[tenant]
                named = self.model.seen(tenant, owner, name)
                content = None if named is None else named.contents.get(of_alias or named.current)
                self.check(tenant, "z", content, said(tenant, owner, name))

    def check(self, tenant: str, reference: str, content: int | None, name: str) -> None:
        """Whether asking `reference` gives this content, or is refused."""
        of, index = self.of[tenant], self.of[tenant].names.index
        found = None
        with suppress(AdapterNotFoundError, VersionNotFoundError):
            lease = of.lease(reference)
            found = lease.record
            lease.release()
        assert (found and found.digest) == (None if content is None else self.digests[content]), (tenant, reference)
        resolved = None
        with suppress(AdapterNotFoundError, VersionNotFoundError):
            resolved = index.resolve(reference)
        assert resolved == found
        if found is not None:
            assert found.name == name
            assert (found.source == "shared") == ("~" in name)

    @invariant()
    def cards_are_there_for_whoever_may_ask(self) -> None:
        for tenant, of in self.of.items():
            for owner in TENANTS:
                for name in NAMES:
                    asked = f"{owner}~{name}"
                    if self.model.seen(tenant, owner, name):
                        assert (of.card(asked).shared_with is None) == (owner != tenant)
                    else:
                        with pytest.raises(AdapterNotFoundError, match=f"^there is no adapter called '{asked}'$"):
                            of.card(asked)


def test_nobody_ever_sees_what_he_may_not(tmp_path: Path) -> None:
    Machine.folders = [
        adapter_files.write_adapter(tmp_path / str(number), seed=number) for number in range(NUM_CONTENTS)
    ]
    few = settings(
        max_examples=size(ci=15, soak=500),
        stateful_step_count=size(ci=25, soak=60),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run(Machine, settings=few)
