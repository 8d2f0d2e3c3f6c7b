"""A registry under any sequence of operations, restarts among them, against a model made of dicts."""

import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)
from hypothesis.stateful import run_state_machine_as_test as run

import adapter_files
from soak import size
from swaplora_adapters.errors import (
    AdapterBusyError,
    AdapterNotFoundError,
    PreconditionFailedError,
    VersionNotFoundError,
)
from swaplora_adapters.registry.leases import Removal, RequestLeases
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.registry.residency.host_tier import HostTier
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.store.conditions import Conditions
from swaplora_adapters.store.records import Target
from swaplora_adapters.store.staging import FILE_NAMES, Staging
from swaplora_adapters.store.store import Store
from swaplora_adapters.weights.device_copy import DeviceCopier
from swaplora_adapters.weights.memory import Arena

NAMES = st.sampled_from(["a", "ab", "b.c"])
ALIASES = st.sampled_from(["x", "y"])
CONTENTS = st.integers(0, 4)
KEPT = 2
ROOM = 5  # adapters that fit in memory at once: as many as there are contents, so that no lease waits for another


@dataclass
class Named:
    """What the model knows of a name."""

    contents: dict[int, int] = field(default_factory=dict)  # by version
    current: int = 0
    last: int = 0
    is_pinned: bool = False


class Machine(RuleBasedStateMachine):
    """Every rule does to the registry and to the model the same, and expects the same of both."""

    leases: Bundle[tuple[RequestLeases, int]] = Bundle("leases")
    folders: list[Path]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.names: dict[str, Named] = {}
        self.aliases: dict[str, str] = {}
        self.held: Counter[int] = Counter()
        self.removals: list[tuple[Removal, set[int]]] = []
        self.digests: dict[int, str] = {}
        self.open()

    def open(self) -> None:
        num_bytes = 4 * sum(t.numel() for t in adapter_files.factors().values())
        self.registry = Registry(
            Store(Path(self.folder.name)),
            sources=Sources(allowed=(), folder=None, max_weights_bytes=0),
            layers=adapter_files.LAYERS,
            dtype=torch.float32,
            memory_budget=ROOM * num_bytes,
            wait_seconds=30,
            keep_versions=KEPT,
            base_model="base",
            prepare=DeviceCopier(torch.device("cpu", 0), 1 << 16).copy,  # the same memory by another name
            host=HostTier(num_bytes, Arena(torch.empty(num_bytes + 4096, dtype=torch.uint8))),
        )

    def live(self, name: str) -> Named | None:
        named = self.names.get(name)
        return named if named is not None and named.contents else None

    def put_bytes(self, name: str, content: int, if_match: str | None = None) -> None:
        with self.registry.stage() as staging:
            write(staging, self.folders[content])
            put = self.registry.put(name, staging, source="upload", conditions=Conditions(if_match=if_match))
        self.digests[content] = put.card.record.digest

    @rule(name=NAMES, content=CONTENTS)
    def put(self, name: str, content: int) -> None:
        self.put_bytes(name, content)
        named = self.names.setdefault(name, Named())
        if not named.contents or named.contents[named.current] != content:
            named.last += 1
            named.current = named.last
            named.contents[named.current] = content
        self.retire_old_versions(name)

    @rule(name=NAMES, content=CONTENTS)
    def put_over_what_is_not_there(self, name: str, content: int) -> None:
        named = self.live(name)
        with suppress(PreconditionFailedError):
            self.put_bytes(name, content, if_match="sha256:" + "0" * 64)
            raise AssertionError("a digest that is not the current one was taken for it")
        if named is not None:
            self.put_bytes(name, named.contents[named.current], if_match=self.digests[named.contents[named.current]])
            self.retire_old_versions(name)

    def retire_old_versions(self, name: str) -> None:
        """What any upload does, that of the same bytes too: an alias may have kept one that is no longer needed."""
        named = self.names[name]
        for version in sorted(named.contents)[:-KEPT]:
            if version != named.current and not self.needing(name, {version}):
                del named.contents[version]

    @rule(data=st.data(), is_whole=st.booleans())
    def delete(self, data: st.DataObject, is_whole: bool) -> None:
        name, version = self.draw_version(data)
        named = self.live(name)
        doomed = set() if named is None else set(named.contents) if is_whole else {version} & set(named.contents)
        try:
            removal = self.registry.delete(name, None if is_whole else version)
        except (AdapterNotFoundError, VersionNotFoundError):
            assert not doomed
            return
        except AdapterBusyError:
            assert self.needing(name, doomed)
            return
        assert named is not None
        assert doomed
        assert not self.needing(name, doomed)
        removed = {named.contents.pop(gone) for gone in doomed}
        self.removals.append((removal, removed))
        self.registry.check_integrity()  # by when the cleaner has had its turn
        assert removal.freed.done() == (not any(self.held[content] for content in removed - self.live_contents()))
        if named.current not in named.contents:
            named.current = max(named.contents, default=0)
        named.is_pinned &= bool(named.contents)

    @rule(data=st.data(), is_pinned=st.none() | st.booleans())
    def change(self, data: st.DataObject, is_pinned: bool | None) -> None:
        name, version = self.draw_version(data)
        named = self.live(name)
        is_there = named is not None and version in named.contents
        try:
            card = self.registry.change(name, current=version, is_pinned=is_pinned)
        except (AdapterNotFoundError, VersionNotFoundError):
            assert not is_there
            return
        assert named is not None
        assert card.record.version == version
        named.current = version
        named.is_pinned = named.is_pinned if is_pinned is None else is_pinned

    @rule(alias=ALIASES, data=st.data(), is_version=st.booleans())
    def put_alias(self, alias: str, data: st.DataObject, is_version: bool) -> None:
        name, version = self.draw_version(data)
        named = self.live(name)
        reference = f"{name}@{version}" if is_version else name
        try:
            self.registry.put_alias(alias, [Target(reference, 1)])
        except (AdapterNotFoundError, VersionNotFoundError):
            assert named is None or (is_version and version not in named.contents)
            return
        self.aliases[alias] = reference

    @precondition(lambda self: self.aliases)
    @rule(data=st.data())
    def delete_alias(self, data: st.DataObject) -> None:
        alias = data.draw(st.sampled_from(sorted(self.aliases)))
        self.registry.delete_alias(alias)
        del self.aliases[alias]

    @rule(target=leases, data=st.data(), how=st.sampled_from(["name", "version", "digest", "alias"]))
    def lease(
        self, data: st.DataObject, how: str
    ) -> tuple[RequestLeases, int] | MultipleResults[tuple[RequestLeases, int]]:
        name, version = self.draw_version(data)
        reference = {"name": name, "version": f"{name}@{version}", "alias": data.draw(ALIASES)}.get(how, "")
        expected = self.content(reference)
        if how == "digest":
            expected = self.content(f"{name}@{version}")
            reference = f"{name}@{self.digests[expected] if expected is not None else 'sha256:' + 'e' * 64}"
        try:
            lease = self.registry.lease(reference)
        except (AdapterNotFoundError, VersionNotFoundError):
            assert expected is None
            return multiple()
        assert expected is not None
        request_leases = self.registry.lease_weights([lease])
        assert lease.record.digest == self.digests[expected]
        assert request_leases.weights.result(30)[lease.record.digest].digest == self.digests[expected]
        self.held[expected] += 1
        return request_leases, expected

    @rule(held=consumes(leases))
    def release(self, held: tuple[RequestLeases, int]) -> None:
        request_leases, content = held
        assert request_leases.weights.result()[self.digests[content]].digest == self.digests[content]
        request_leases.release()
        self.held[content] -= 1

    @precondition(lambda self: not self.held.total())
    @rule()
    def restart(self) -> None:
        self.registry.close()
        self.removals.clear()
        self.open()

    @invariant()
    def names_are_as_in_the_model(self) -> None:
        cards = {card.record.name: card for card in self.registry.cards()}
        assert set(cards) == {name for name in self.names if self.live(name)}
        for name, card in cards.items():
            named = self.names[name]
            assert (card.record.version, card.is_pinned) == (named.current, named.is_pinned)
            assert self.registry.names.index.resolve(name) == card.record
            assert {v.version: v.digest for v in card.versions} == {
                version: self.digests[content] for version, content in named.contents.items()
            }
        assert {
            alias.alias: alias.targets[0].reference for alias in self.registry.names.index.aliases()
        } == self.aliases

    @invariant()
    def what_was_removed_is_freed_when_nobody_holds_it(self) -> None:
        self.registry.check_integrity()
        for removal, contents in self.removals:
            if not any(self.held[content] for content in contents - self.live_contents()):
                assert removal.freed.done()

    def teardown(self) -> None:
        self.registry.close()
        self.folder.cleanup()

    def live_contents(self) -> set[int]:
        return {content for named in self.names.values() for content in named.contents.values()}

    def draw_version(self, data: st.DataObject) -> tuple[str, int]:
        """A name and a version, mostly of those that there are."""
        there = [(name, version) for name, named in self.names.items() for version in named.contents]
        gone = [(name, 1 + version) for name, version in there]
        return data.draw(st.sampled_from([*there, *there, *gone, ("nobody", 1)]))

    def content(self, reference: str) -> int | None:
        """What the model says that a reference means."""
        name, _, version = self.aliases.get(reference, reference).partition("@")
        named = self.live(name)
        return None if named is None else named.contents.get(int(version) if version else named.current)

    def needing(self, name: str, doomed: set[int]) -> bool:
        """Whether some alias would lead nowhere without these versions."""
        left = set(self.names[name].contents) - doomed
        targets = [target.partition("@") for target in self.aliases.values()]
        return any(t == name and not (int(v) in left if v else left) for t, _, v in targets)


def write(staging: Staging, folder: Path) -> None:
    """Copy an adapter's files as an upload does."""
    for part, file in FILE_NAMES.items():
        with staging.writer(part, 1 << 20) as writer:
            writer.write((folder / file).read_bytes())


def test_a_registry_does_what_the_model_says(tmp_path: Path) -> None:
    Machine.folders = [adapter_files.write_adapter(tmp_path / str(n), seed=n) for n in range(5)]
    few = settings(
        max_examples=size(ci=25, soak=500),
        stateful_step_count=size(ci=40, soak=100),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run(Machine, settings=few)
