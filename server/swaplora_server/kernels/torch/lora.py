"""The LoRA operation in torch's own GEMMs, two a segment, on any device. It is the definition of SGMV and BGMV here."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from swaplora_server.kernels.backend import LoraOp
from swaplora_server.kernels.rows import Segment


class Prepared(NamedTuple):
    """A step's segments, and the paths of all modules by number."""

    segments: Sequence[Segment]
    paths: Sequence[str]


def _add(y: Tensor, x: Tensor, prepared: Prepared, number: int) -> None:
    """y[start:stop] = (y[start:stop] + scale · (x[start:stop] Aᵀ) Bᵀ) · column_scale + scale · shift.

    y: [num_rows, out_features], written in place. x: [num_rows, in_features].
    """
    for segment in prepared.segments:
        module = segment.weights.modules.get(prepared.paths[number])
        if module is not None:
            lora_A, lora_B = module.lora_A.to(x.dtype), module.lora_B.to(x.dtype)
            rows = slice(segment.start, segment.stop)
            y[rows].addmm_(x[rows].mm(lora_A.t()), lora_B.t(), alpha=segment.scale)
            if module.column_scale is not None:
                y[rows] *= module.column_scale.to(y.dtype)
            if module.shift is not None:
                y[rows].add_(module.shift.to(y.dtype), alpha=segment.scale)


OP = LoraOp(prepare=Prepared, add=_add)
