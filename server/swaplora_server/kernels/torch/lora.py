"""The LoRA operation in torch's own GEMMs, two a segment, on any device. It is the definition of SGMV and BGMV here."""

from collections.abc import Sequence

from torch import Tensor

from swaplora_adapters.weights.served import AdapterWeights, LinearWeights
from swaplora_server.kernels.step import Segments


class ModulesByNumber:
    """What an adapter adds to each module."""

    def __init__(self, weights: AdapterWeights, paths: Sequence[str]) -> None:
        self.modules = [weights.modules.get(path) for path in paths]


class TorchLora:
    """See `LoraStep`."""

    def __init__(self, segments: Segments) -> None:
        self._segments = [
            (_modules_of(segment.weights), segment.scale, slice(segment.start, segment.stop)) for segment in segments
        ]

    def add(self, x: Tensor, outputs: Sequence[tuple[Tensor, int]]) -> None:
        """y[rows] = (y[rows] + scale · (x[rows] Aᵀ) Bᵀ) · column_scale + scale · shift, segment by segment."""
        for y, number in outputs:
            for modules, scale, rows in self._segments:
                if (module := modules[number]) is not None:
                    _add(y[rows], x[rows], module, scale)


def _add(y: Tensor, x: Tensor, module: LinearWeights, scale: float) -> None:
    lora_A, lora_B = module.lora_A.to(x.dtype), module.lora_B.to(x.dtype)
    y.addmm_(x.mm(lora_A.t()), lora_B.t(), alpha=scale)
    if module.column_scale is not None:
        y *= module.column_scale.to(y.dtype)
    if module.shift is not None:
        y.add_(module.shift.to(y.dtype), alpha=scale)


def _modules_of(weights: AdapterWeights) -> Sequence[LinearWeights | None]:
    if not isinstance(weights.tables, ModulesByNumber):
        raise RuntimeError(f"adapter {weights.digest} was not prepared for torch's operations")
    return weights.tables.modules
