"""The definition that every other form is tested against."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from swaplora_adapters.weights.router import Shares, Trace
from swaplora_server.kernels.step import Segments


@dataclass(frozen=True)
class ReferenceLora:
    """y[start:stop] = (y[start:stop] + scale · (x[start:stop] Aᵀ) Bᵀ) · column_scale + scale · shift.

    Computed in float32 and rounded once.
    """

    segments: Segments
    paths: Sequence[str]

    def add(self, x: Tensor, outputs: Sequence[tuple[Tensor, int]]) -> None:
        """See `LoraStep`."""
        for y, number in outputs:
            for segment in self.segments:
                module = segment.weights.modules.get(self.paths[number])
                if module is None:
                    continue
                rows = slice(segment.start, segment.stop)
                delta = (x[rows].float() @ module.lora_A.float().T) @ module.lora_B.float().T
                result = y[rows].float() + segment.scale * delta
                if module.column_scale is not None:
                    result = result * module.column_scale
                if module.shift is not None:
                    result = result + segment.scale * module.shift
                y[rows] = result.to(y.dtype)

    def shares(self, _trace: Trace) -> Shares | None:
        """Nothing here is a mixture's."""
        return None
