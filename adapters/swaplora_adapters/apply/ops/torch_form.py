"""The form that is always there: two library GEMMs a segment, on any device."""

from collections.abc import Sequence

from torch import Tensor

from swaplora_adapters.apply.activation import LoraOp, ModuleSegment


def _add(y: Tensor, x: Tensor, segments: Sequence[ModuleSegment]) -> None:
    """y[start:stop] += scale · (x[start:stop] Aᵀ) Bᵀ.

    y: [num_rows, out_features], written in place. x: [num_rows, in_features].
    """
    for lora_A, lora_B, scale, start, stop in segments:
        y[start:stop].addmm_(x[start:stop].mm(lora_A.t()), lora_B.t(), alpha=scale)


OP = LoraOp(prepare=tuple, add=_add)
