"""The definition that every other form is tested against."""

from collections.abc import Sequence

from torch import Tensor

from swaplora_adapters.apply.activation import LoraOp, ModuleSegment


def _add(y: Tensor, x: Tensor, segments: Sequence[ModuleSegment]) -> None:
    """y[start:stop] += scale · (x[start:stop] Aᵀ) Bᵀ, computed in float32 and rounded once.

    y: [num_rows, out_features], written in place. x: [num_rows, in_features].
    """
    for lora_A, lora_B, scale, start, stop in segments:
        delta = (x[start:stop].float() @ lora_A.float().T) @ lora_B.float().T
        y[start:stop] = (y[start:stop].float() + scale * delta).to(y.dtype)


OP = LoraOp(prepare=tuple, add=_add)
