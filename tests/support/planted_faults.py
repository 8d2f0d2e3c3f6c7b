"""Faults to plant: each makes a server answer with the wrong weights, so that the proof can be seen to fail."""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from swaplora_adapters.registry import registry
from swaplora_adapters.registry.residency.claims import Claim
from swaplora_adapters.registry.residency.residency import Residency
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base.adapter_proof import AdapterProof
from swaplora_server.engine import step
from swaplora_server.engine.request import AdapterUse, Request
from swaplora_server.kernels.step import Segments
from swaplora_server.service.adapter_mix import AdapterMix

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
    patch.setattr(registry, "load_weights", reusing)


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


FAULTS: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    "name": keyed_by_name,
    "name-unchecked": keyed_by_name_unchecked,
    "freed": freed_in_use,
    "neighbour": neighbours_weights,
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
