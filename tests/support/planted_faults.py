"""Faults to plant: each makes a server answer with the wrong weights, so that the proof can be seen to fail."""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from swaplora_adapters.registry import loader
from swaplora_adapters.registry.index import Index
from swaplora_adapters.registry.residency.claims import Claim
from swaplora_adapters.registry.residency.residency import Residency
from swaplora_adapters.store.records import Alias
from swaplora_adapters.store.shared.files import SharedFiles
from swaplora_adapters.store.shared.store import SharedStore
from swaplora_adapters.store.staging import Staging
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base.adapter_proof import AdapterProof
from swaplora_server.engine import request, step
from swaplora_server.engine.block_keys import root_key
from swaplora_server.engine.request import AdapterUse, Request
from swaplora_server.kernels.step import Segments
from swaplora_server.service.adapter_mix import AdapterMix
from swaplora_server.service.service import Service

NUM_SLOTS = 3


def keyed_by_name(patch: pytest.MonkeyPatch) -> None:
    """Weights are remembered by name: a replaced name goes on with what it was loaded with first."""
    uses = AdapterMix.uses
    kept: dict[str, AdapterWeights] = {}

    async def remembering(self: AdapterMix) -> tuple[AdapterUse, ...]:
        own = zip(await uses(self), self.leases, strict=True)
        return tuple(replace(use, weights=kept.setdefault(lease.record.name, use.weights)) for use, lease in own)

    patch.setattr(AdapterMix, "uses", remembering)


def keyed_by_name_unchecked(patch: pytest.MonkeyPatch) -> None:
    """The same, and the engine does not compare digests: nothing but the answer's tokens can tell."""
    keyed_by_name(patch)
    patch.setattr(step, "checked_weights", lambda use: use.weights)


def freed_in_use(patch: pytest.MonkeyPatch) -> None:
    """Memory goes back as soon as its weights are there, and a load overwrites the oldest of a few fixed slots."""
    retain, load = Residency.retain, load_weights
    slots: list[AdapterWeights] = []
    turns = itertools.cycle(range(NUM_SLOTS))

    def too_early(self: Residency, *arguments: Any) -> Claim:
        claim = retain(self, *arguments)
        claim.weights.add_done_callback(lambda _weights: threading.Thread(target=self.release, args=(claim,)).start())
        return claim

    def reusing(*arguments: Any) -> AdapterWeights:
        weights = load(*arguments)
        if len(slots) < NUM_SLOTS:
            slots.append(weights)
            return weights
        return _overwritten(slots[next(turns)], weights)

    patch.setattr(Residency, "retain", too_early)
    patch.setattr(loader, "load_weights", reusing)


def unproven(patch: pytest.MonkeyPatch) -> None:
    """A base is served without a look at what adapters make of it, which would show many a fault at start."""
    patch.setattr(AdapterProof, "run", lambda *_: None)


def neighbours_weights(patch: pytest.MonkeyPatch) -> None:
    """Each run of rows in a step gets the adapter of the run behind it, and the last that of the first."""
    unproven(patch)
    segments = step._segments  # noqa: SLF001

    def shifted(requests: Sequence[Request], spans: Sequence[tuple[int, int]]) -> Segments:
        return _rotated(segments(requests, spans))

    patch.setattr(step, "_segments", shifted)


def prefixes_of_all(patch: pytest.MonkeyPatch) -> None:
    """Keys and values are known by their tokens alone: what another version has computed is found."""
    patch.setattr(request, "root_key", lambda adapters, salt: root_key([("", scale) for _, scale in adapters], salt))


def alias_unmoved(patch: pytest.MonkeyPatch) -> None:
    """Wherever an alias was looked up once it goes on with what it stood for then."""
    find: Callable[..., Alias | None] = vars(Index)["_find"]
    kept: dict[tuple[int, str], Alias] = {}

    def remembered(self: Index, name: str, *, is_mixture: bool) -> Alias | None:
        found = find(self, name, is_mixture=is_mixture)
        return found if found is None or is_mixture else kept.setdefault((id(self), name), found)

    patch.setattr(Index, "_find", remembered)


def looks_skipped(patch: pytest.MonkeyPatch) -> None:
    """All servers but the first go on with what they know, and hear of others' changes when they make one."""
    see = Service.see_others_changes
    first: list[Service] = []

    async def skipped(self: Service) -> bool:
        first[:] = first or [self]
        return await see(self) if self is first[0] else True

    patch.setattr(Service, "see_others_changes", skipped)
    patch.setattr("swaplora_adapters.registry.changes.LOOK_SECONDS", 3600.0)


def fetched_otherwise(patch: pytest.MonkeyPatch) -> None:
    """What is fetched from a shared store is always the files of the adapter that was fetched first."""
    fetch = SharedFiles.fetch
    first: list[tuple[str, str]] = []

    def otherwise(self: SharedFiles, digest: str, place: str, staging: Staging) -> None:
        first[:] = first or [(digest, place)]
        fetch(self, *first[0], staging)

    patch.setattr(SharedFiles, "fetch", otherwise)


def fetched_otherwise_unchecked(patch: pytest.MonkeyPatch) -> None:
    """The same, and nobody looks whether the digest is theirs."""
    fetched_otherwise(patch)
    patch.setattr(SharedStore, "verify", lambda _self, _digest: None)


FAULTS: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    "name": keyed_by_name,
    "name-unchecked": keyed_by_name_unchecked,
    "freed": freed_in_use,
    "neighbour": neighbours_weights,
    "prefix": prefixes_of_all,
    "alias": alias_unmoved,
}
FAULTS_OF_SEVERAL: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    "look": looks_skipped,
    "fetch": fetched_otherwise,
    "fetch-unchecked": fetched_otherwise_unchecked,
}


def _overwritten(slot: AdapterWeights, weights: AdapterWeights) -> AdapterWeights:
    """`weights` in the memory of `slot`, whose adapter has the same shapes."""
    with torch.no_grad():
        for path, module in weights.modules.items():
            for held, other in zip(slot.modules[path].tensors, module.tensors, strict=True):
                held.copy_(other)
    return replace(slot, digest=weights.digest)


def _rotated(segments: Segments) -> Segments:
    behind = [*segments.adapters[1:], *segments.adapters[:1]]
    return Segments([segment._replace(weights=other) for segment, other in zip(segments, behind, strict=True)])
