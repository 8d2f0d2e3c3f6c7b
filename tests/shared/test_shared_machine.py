"""Two servers and a dict: whatever is done by whom, in whatever order, with restarts and lost answers between."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from adapter_files import write_adapter
from replicas import Disturbed, put, registry, see, unreachable
from soak import size
from swaplora_adapters.errors import AdapterBusyError, AdapterNotFoundError, AliasNotFoundError, VersionNotFoundError
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.store.records import Target
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.history import compaction, segments
from swaplora_adapters.store.shared.history import log as shared_log

SERVERS, NAMES, CONTENTS = st.integers(0, 1), st.sampled_from(["a", "b"]), st.integers(0, 3)


class Machine(RuleBasedStateMachine):
    """Each rule has one of the two change something, of which the other has not been told."""

    files: list[Path]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        (root / "shared").mkdir()
        self.objects = [Disturbed(open_objects(str(root / "shared"))) for _ in range(2)]
        self.servers: list[Registry] = []
        for number in range(2):
            self.servers.append(registry(root / f"data{number}", self.objects[number]))
        self.names: dict[str, tuple[dict[int, int], int, int]] = {}  # contents by version, current, last
        self.aliases: dict[str, str] = {}

    @rule(by=SERVERS, name=NAMES, content=CONTENTS)
    def put(self, by: int, name: str, content: int) -> None:
        record = put(self.servers[by], name, self.files[content]).record
        versions, current, last = self.names.get(name, ({}, 0, 0))
        if versions.get(current) != content:
            self.names[name] = (versions | {last + 1: content}, last + 1, last + 1)
        assert record.version == self.names[name][1]

    @rule(by=SERVERS, name=NAMES, version=st.integers(1, 4))
    def roll(self, by: int, name: str, version: int) -> None:
        versions, _, last = self.names.get(name, ({}, 0, 0))
        try:
            self.servers[by].change(name, current=version)
            assert version in versions
            self.names[name] = (versions, version, last)
        except (AdapterNotFoundError, VersionNotFoundError):
            assert version not in versions

    @rule(by=SERVERS, name=NAMES)
    def delete(self, by: int, name: str) -> None:
        versions, _, last = self.names.get(name, ({}, 0, 0))
        try:
            self.servers[by].delete(name)
            assert versions
            assert name not in self.aliases.values()
            self.names[name] = ({}, 0, last)
        except AdapterNotFoundError:
            assert not versions
        except AdapterBusyError:
            assert name in self.aliases.values()

    @rule(by=SERVERS, alias=st.sampled_from(["x", "y"]), name=NAMES)
    def put_alias(self, by: int, alias: str, name: str) -> None:
        try:
            self.servers[by].put_alias(alias, [Target(name, 1)])
            assert self.names[name][0]
            self.aliases[alias] = name
        except AdapterNotFoundError:
            assert not self.names.get(name, ({}, 0, 0))[0]

    @rule(by=SERVERS, alias=st.sampled_from(["x", "y"]))
    def delete_alias(self, by: int, alias: str) -> None:
        try:
            self.servers[by].delete_alias(alias)
            del self.aliases[alias]
        except AliasNotFoundError:
            assert alias not in self.aliases

    @rule(by=SERVERS)
    def restart(self, by: int) -> None:
        self.servers[by].close()
        self.servers[by] = registry(Path(self.folder.name) / f"data{by}", self.objects[by])

    @rule(by=SERVERS, is_after=st.booleans())
    def lose_an_answer(self, by: int, is_after: bool) -> None:
        """Of the next object that is made, before or after that was done."""
        objects = self.objects[by]

        def lose(call: str, _key: str) -> None:
            if call == "create":
                objects.come_back()
                raise unreachable()

        objects.come_back()
        if is_after:
            objects.after = lose
        else:
            objects.before = lose

    @rule(by=SERVERS)
    def compact(self, by: int) -> None:
        """The log is cut at once, and nobody trusts that what follows is there."""
        self.servers[by]._store.tidy()  # noqa: SLF001

    @rule(by=SERVERS)
    def look(self, by: int) -> None:
        """Between two looks the other may have changed anything: what is changed then is so by what there is."""
        see(self.servers[by])
        index = self.servers[by].names.index
        told = {n.current.name: (n.current.version, [r.version for r in n.versions]) for n in index.all()}
        assert told == {name: (c, sorted(v)) for name, (v, c, _) in self.names.items() if v}
        assert {a.alias: a.targets[0].reference for a in index.aliases()} == self.aliases

    def teardown(self) -> None:
        for by in range(2):
            self.look(by)
        close: list[Callable[[], None]] = [server.close for server in self.servers]
        for each in close:
            each()
        self.folder.cleanup()


def test_two_servers_do_what_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 3)
    monkeypatch.setattr(compaction, "GRACE_SECONDS", -1.0)
    monkeypatch.setattr(shared_log, "TRUST_SECONDS", -1.0)
    Machine.files = [write_adapter(tmp_path / f"a{seed}", seed=seed) for seed in range(4)]
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=size(15, 1000), stateful_step_count=20, deadline=None)
    )
