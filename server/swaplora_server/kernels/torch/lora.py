"""The LoRA operation in torch's own GEMMs, two a segment, on any device. It is the definition of SGMV and BGMV here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from swaplora_adapters.weights.router import Router, Shares, Trace
from swaplora_adapters.weights.served import AdapterWeights, LinearWeights
from swaplora_server.kernels.shares import TracedShares
from swaplora_server.kernels.step import Segment, Segments


class ModulesByNumber:
    """What an adapter adds to each module."""

    def __init__(self, weights: AdapterWeights, paths: Sequence[str]) -> None:
        self.modules = [weights.modules.get(path) for path in paths]


class TorchLora:
    """See `LoraStep`."""

    def __init__(self, segments: Segments) -> None:
        self._segments = [(segment, _modules_of(segment.weights)) for segment in segments]
        self._traced = TracedShares(segments)

    def add(self, x: Tensor, outputs: Sequence[tuple[Tensor, int]]) -> None:
        """y[rows] = (y[rows] + scale · (x[rows] Aᵀ) Bᵀ) · column_scale + scale · shift, segment by segment."""
        for y, number in outputs:
            shares = x.new_empty(0, 0)
            for segment, modules in self._segments:
                if (module := modules[number]) is not None:
                    rows = slice(segment.start, segment.stop)
                    if segment.route is not None and segment.route.member == 0:
                        shares = self._shares(x[rows], segment, segment.route.router, number)
                    _add(y[rows], x[rows], module, segment.scale, _share(shares, segment))

    def shares(self, trace: Trace) -> Shares | None:
        """See `LoraStep`."""
        return self._traced.find(trace)

    def _shares(self, x: Tensor, segment: Segment, router: Router, number: int) -> Tensor:
        shares = shares_of(x, router, number)
        if (traced := self._traced.of(segment)) is not None:
            traced[number] = shares.cpu().numpy()
        return shares


def shares_of(x: Tensor, router: Router, number: int) -> Tensor:
    """How much of each member every row takes at a module; of members that are equally like, the first is taken.

    x: [num_rows, in_features] → float32 [num_rows, num_members].
    """
    prototypes = torch.stack([vector for each in router.members if (vector := each.vectors[number]) is not None])
    likeness = (x.float() @ prototypes.t()).abs()
    chosen = likeness.sort(dim=1, descending=True, stable=True).indices[:, : router.top_k]
    scores = torch.full_like(likeness, -torch.inf).scatter_(1, chosen, likeness.gather(1, chosen))
    return (scores / router.temperature).softmax(1)


def _share(shares: Tensor, segment: Segment) -> Tensor | None:
    return None if segment.route is None else shares[:, segment.route.member, None]


def _add(y: Tensor, x: Tensor, module: LinearWeights, scale: float, share: Tensor | None) -> None:
    lora_A, lora_B = module.lora_A.to(x.dtype), module.lora_B.to(x.dtype)
    shrunk = x.mm(lora_A.t())
    y.addmm_(shrunk if share is None else (shrunk * share).to(x.dtype), lora_B.t(), alpha=scale)
    if module.column_scale is not None:
        y *= module.column_scale.to(y.dtype)
    if module.shift is not None:
        y.add_(module.shift.to(y.dtype), alpha=scale)


def _modules_of(weights: AdapterWeights) -> Sequence[LinearWeights | None]:
    if not isinstance(weights.tables, ModulesByNumber):
        raise RuntimeError(f"adapter {weights.digest} was not prepared for torch's operations")
    return weights.tables.modules
