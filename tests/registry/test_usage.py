"""Whoever counts is told by name what becomes of adapters in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import adapter_files
from swaplora_adapters.errors import AdapterError
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.registry.residency.host_tier import HostTier
from swaplora_adapters.registry.tenant import TenantRegistry
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.sources.watcher import put_folder
from swaplora_adapters.store.staging import FILE_NAMES
from swaplora_adapters.store.store import Store

NUM_BYTES = 4 * sum(tensor.numel() for tensor in adapter_files.factors().values())


@dataclass
class Told:
    """A listener that notes what it is told."""

    calls: list[tuple[str, ...]] = field(default_factory=list)

    def looked_up(self, names: Sequence[str], *, were_there: bool) -> None:
        self.calls.append(("there" if were_there else "missing", *names))

    def loaded(self, name: str, stages: dict[str, float]) -> None:
        assert all(seconds >= 0 for seconds in stages.values())
        self.calls.append(("loaded", name, *stages))

    def load_failed(self, name: str, error: BaseException) -> None:
        self.calls.append(("failed", name))

    def evicted(self, name: str) -> None:
        self.calls.append(("evicted", name))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def registry(tmp_path: Path, told: Told) -> Iterator[Registry]:
    """Room for one adapter on the device and for one on the host; `c` has the bytes of `a`."""
    registry = Registry(
        Store(tmp_path / "data"),
        sources=Sources(allowed=(), folder=None, max_weights_bytes=0),
        layers=adapter_files.LAYERS,
        dtype=torch.float32,
        memory_budget=NUM_BYTES,
        wait_seconds=30,
        keep_versions=1,
        base_model="base",
        prepare=replace,
        host=HostTier(NUM_BYTES),
        listener=told,
    )
    for seed, name in ((0, "a"), (1, "b"), (0, "c")):
        put_folder(registry, name, adapter_files.write_adapter(tmp_path / name, seed=seed))
    yield registry
    registry.close()


def use(registry: Registry, name: str) -> None:
    leases = registry.lease_weights([registry.lease(name)])
    try:
        leases.weights.result(timeout=60)
    finally:
        leases.release()


READ = ("read", "verify", "prepare")


def test_what_a_tenant_calls_as_another_does_is_told_of_its_own(registry: Registry, told: Told, tmp_path: Path) -> None:
    own = TenantRegistry(registry, "acme")
    folder = adapter_files.write_adapter(tmp_path / "own", seed=7)
    with own.stage() as staging:
        for part, file in FILE_NAMES.items():
            with staging.writer(part, 1 << 20) as writer:
                writer.write((folder / file).read_bytes())
        own.put("a", staging, source="upload")
    use(own, "a")
    use(registry, "b")
    stored = own.names.stored_version("a").partition("@")[0]
    assert stored not in ("a", "b")
    assert [call[:2] for call in told.calls] == [
        *(("missing", stored), ("loaded", stored)),
        *(("evicted", stored), ("missing", "b"), ("loaded", "b")),
    ]


def test_who_is_there_who_is_loaded_and_who_goes_for_it(registry: Registry, told: Told) -> None:
    for name in ("a", "a", "b"):
        use(registry, name)
    assert told.calls == [
        ("missing", "a"),
        ("loaded", "a", *READ),
        ("there", "a"),
        ("evicted", "a"),
        ("missing", "b"),
        ("loaded", "b", *READ),
    ]


def test_a_load_out_of_the_hosts_memory_reads_nothing(registry: Registry, told: Told) -> None:
    use(registry, "a")
    use(registry, "b")  # which takes the host's room, too
    told.calls.clear()
    registry._residency.drop(registry.card("b").record.digest)  # noqa: SLF001 - as a device would lose it
    use(registry, "b")
    assert told.calls == [("missing", "b"), ("loaded", "b", "prepare")]


def test_shared_bytes_are_theirs_who_asked_last(registry: Registry, told: Told) -> None:
    for name in ("a", "c", "b"):
        use(registry, name)
    assert ("there", "c") in told.calls
    assert ("evicted", "c") in told.calls


def test_a_pinned_one_is_loaded_under_its_name_without_a_request(registry: Registry, told: Told) -> None:
    registry.change("b", is_pinned=True)
    use(registry, "b")
    assert [call for call in told.calls if call[0] == "loaded"] == [("loaded", "b", *READ)]


def test_a_load_that_fails_is_told_once_and_what_is_refused_at_once_is_no_look(registry: Registry, told: Told) -> None:
    (weights,) = (registry._store.blob_paths(registry.card("b").record.digest).weights,)  # noqa: SLF001
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    for _ in range(2):
        with pytest.raises(AdapterError):
            use(registry, "b")
    assert told.calls == [("missing", "b"), ("failed", "b")]


def test_states_say_where_each_adapter_is(registry: Registry) -> None:
    use(registry, "b")
    registry.change("b", is_pinned=True)
    states = {state.name: state for state in registry.states()}
    assert {name: (state.tier, state.is_pinned) for name, state in states.items()} == {
        "a": ("disk", False),
        "b": ("device", True),
        "c": ("disk", False),
    }
    assert {state.num_bytes for state in states.values()} == {NUM_BYTES}
    assert not any(state.is_loading for state in states.values())
