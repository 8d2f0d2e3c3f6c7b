"""Adapters that leave the device stay in the host's memory, within its budget, and come back without their files."""

import ctypes
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adapter_files
from swaplora_adapters.registry import loader as loader_module
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.registry.residency.host_tier import HostTier
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.sources.watcher import put_folder
from swaplora_adapters.store.store import Store
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.memory import Arena, Span, pinned
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights


def weights(digest: str, nbytes: int) -> AdapterWeights:
    return AdapterWeights(
        digest, {"m": ModuleWeights(torch.zeros(nbytes, 1, dtype=torch.uint8), torch.zeros(0, nbytes))}
    )


@given(
    st.integers(0, 30),
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 20), st.sampled_from(["keep", "find", "drop"]))),
)
def test_it_keeps_what_was_used_last_within_its_budget(budget: int, calls: list[tuple[str, int, str]]) -> None:
    tier, model = HostTier(budget), dict[str, int]()  # least recently used first
    for digest, nbytes, call in calls:
        if call == "find":
            assert (tier.find(digest) is not None) == (digest in model)
            if digest in model:
                model[digest] = model.pop(digest)
        else:
            model.pop(digest, None)
            if call == "drop":
                tier.drop(digest)
            else:
                tier.keep(weights(digest, nbytes))
                if nbytes <= budget:
                    model[digest] = nbytes
                while sum(model.values()) > budget:
                    del model[next(iter(model))]
        assert tier.nbytes == sum(model.values())
        assert {each for each in "abcdef" if each in tier} == model.keys()


def in_arena(num_bytes: int) -> Arena:
    return Arena(torch.full((num_bytes,), 255, dtype=torch.uint8))


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 5)), max_size=40))
def test_spans_of_an_arena_never_overlap_and_join_again(calls: list[tuple[int, int]]) -> None:
    arena, taken = in_arena(1024), list[Span]()
    for num_bytes, which in calls:
        if which < len(taken):
            arena.give_back(taken.pop(which))
        span = arena.take(num_bytes)
        if span is None:
            assert all(stop - start < num_bytes for start, stop in gaps(taken, 1024)), "there was room"
        else:
            assert span.stop - span.start == -(-num_bytes // 64) * 64
            assert all(span.stop <= other.start or other.stop <= span.start for other in taken)
            taken.append(span)
        assert arena.num_free == 1024 - sum(stop - start for start, stop in taken)
    for span in taken:
        arena.give_back(span)
    assert arena.take(1024) == (0, 1024)


def gaps(taken: list[Span], size: int) -> list[tuple[int, int]]:
    ends = [0, *(end for span in sorted(taken) for end in span), size]
    return list(zip(ends[::2], ends[1::2], strict=True))


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 300), st.sampled_from(["keep", "find", "drop"]))),
)
def test_what_is_kept_in_an_arena_is_what_was_given(calls: list[tuple[str, int, str]]) -> None:
    """However others come and go beside it; and one that was let go comes from the files again."""
    arena = in_arena(512)
    tier, model = HostTier(512, arena), dict[str, int]()
    for number, (digest, nbytes, call) in enumerate(calls):
        if call == "drop":
            tier.drop(digest)
        elif call == "keep":
            rows = torch.full((nbytes, 1), number % 256, dtype=torch.uint8)
            given_weights = AdapterWeights(digest, {"m": ModuleWeights(rows, torch.zeros(0, nbytes))})
            kept = tier.keep(given_weights)
            assert (kept is not given_weights) == (digest in tier)
            model[digest] = number % 256
        elif (found := tier.find(digest)) is not None:
            assert set(found.modules["m"].lora_A.flatten().tolist()) <= {model[digest]}
        tier.check_integrity()


def test_one_that_would_not_fit_the_arena_costs_the_others_nothing() -> None:
    tier = HostTier(512, in_arena(512))
    for digest in "abc":
        tier.keep(weights(digest, 100))
    two = {name: ModuleWeights(torch.zeros(n, 1, dtype=torch.uint8), torch.zeros(0, n)) for name, n in NEARLY.items()}
    odd = AdapterWeights("odd", two)
    assert odd.nbytes <= 512
    assert tier.keep(odd) is odd
    assert [digest in tier for digest in ("a", "b", "c", "odd")] == [True, True, True, False]
    tier.check_integrity()


NEARLY = {"m": 257, "n": 255}  # of 512 bytes, which lie in 576


def test_a_span_that_could_not_be_filled_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise MemoryError

    tier = HostTier(512, in_arena(512))
    with monkeypatch.context() as patched:
        patched.setattr("swaplora_adapters.registry.residency.host_tier.moved", fail)
        with pytest.raises(MemoryError):
            tier.keep(weights("a", 300))
    tier.check_integrity()
    tier.keep(weights("b", 500))
    assert ("a" in tier, "b" in tier) == (False, True)
    tier.check_integrity()


NUM_BYTES = 4 * sum(tensor.numel() for tensor in adapter_files.factors().values())


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Room for one adapter on the device and for two on the host; a copy to the device is another object."""
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
        host=HostTier(2 * NUM_BYTES),
    )
    for seed, name in enumerate("abc"):
        put_folder(registry, name, adapter_files.write_adapter(tmp_path / name, seed=seed))
    yield registry
    registry.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    digests: list[str] = []

    def noted(digest: str, *arguments: object) -> AdapterWeights:
        digests.append(digest)
        return load_weights(digest, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loader_module, "load_weights", noted)
    return digests


def use(registry: Registry, name: str) -> AdapterWeights:
    leases = registry.lease_weights([registry.lease(name)])
    try:
        (weights,) = leases.weights.result(timeout=60).values()
        return weights
    finally:
        leases.release()


def tiers(registry: Registry) -> dict[str, str]:
    return {name: registry.card(name).tier for name in "abc"}


def test_what_left_the_device_comes_back_without_its_files(registry: Registry, reads: list[str]) -> None:
    assert tiers(registry) == dict.fromkeys("abc", "disk")
    first = use(registry, "a")
    use(registry, "b")
    assert tiers(registry) == {"a": "host", "b": "device", "c": "disk"}
    again = use(registry, "a")
    assert len(reads) == 2
    assert again.digest == first.digest
    assert torch.equal(next(again.tensors), next(first.tensors))
    use(registry, "c")  # the host has room for two: b was used less recently there than a
    assert tiers(registry) == {"a": "host", "b": "disk", "c": "device"}
    assert registry.host_bytes == 2 * NUM_BYTES


def test_what_is_replaced_or_deleted_leaves_the_host_too(registry: Registry, tmp_path: Path) -> None:
    use(registry, "a")
    use(registry, "b")
    put_folder(registry, "a", adapter_files.write_adapter(tmp_path / "other", seed=9))
    registry.check_integrity()
    assert registry.host_bytes == NUM_BYTES
    registry.delete("b").freed.result(timeout=60)
    registry.check_integrity()
    assert registry.host_bytes == 0


def test_memory_that_cuda_knows_is_forgotten_by_it_before_the_system_has_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for CUDA's runtime; the pages are still there where it is told."""
    known: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, num_bytes: int, _flags: int) -> int:
            known[address] = num_bytes
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            ctypes.memset(address, 1, known.pop(address))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    memory = pinned(1 << 20)
    assert known == {memory.data_ptr(): 1 << 20}
    part = memory[5:9]
    del memory
    gc.collect()
    assert known
    del part
    gc.collect()
    assert not known
