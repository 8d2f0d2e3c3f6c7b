"""The definition that every other form is tested against."""

from torch import Tensor

from swaplora_server.kernels.backend import LoraOp
from swaplora_server.kernels.torch.lora import Prepared


def _add(y: Tensor, x: Tensor, prepared: Prepared, number: int) -> None:
    """y[start:stop] = (y[start:stop] + scale · (x[start:stop] Aᵀ) Bᵀ) · column_scale + scale · shift.

    Computed in float32 and rounded once.

    y: [num_rows, out_features], written in place. x: [num_rows, in_features].
    """
    for segment in prepared.segments:
        module = segment.weights.modules.get(prepared.paths[number])
        if module is not None:
            rows = slice(segment.start, segment.stop)
            delta = (x[rows].float() @ module.lora_A.float().T) @ module.lora_B.float().T
            result = y[rows].float() + segment.scale * delta
            if module.column_scale is not None:
                result = result * module.column_scale
            if module.shift is not None:
                result = result + segment.scale * module.shift
            y[rows] = result.to(y.dtype)


OP = LoraOp(prepare=Prepared, add=_add)
