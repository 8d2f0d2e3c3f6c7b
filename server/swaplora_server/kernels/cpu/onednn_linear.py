"""Linears in oneDNN's layout, for CPUs with matrix instructions for bfloat16."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# the row count that the layout is tuned for; measured best, or within noise of it, from 2 to 128 rows
_ROWS_HINT = 16
# torch's compiler uses these two; they are private because they have no autograd, which is not needed here
_OPS = torch.ops.mkldnn


class OnednnLinear(nn.Module):
    """y = x Wᵀ + b with W in oneDNN's own layout; no plain copy is kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [out_features, in_features], on CPU."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed = _OPS._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)  # noqa: SLF001
        self.register_buffer("_packed", packed, persistent=False)
        self._bias = None if bias is None else bias.detach()

    @property
    def bias(self) -> Tensor | None:
        """[out_features]."""
        return self._bias

    def dense(self) -> Tensor:
        """[out_features, in_features]: W as a plain copy."""
        assert isinstance(self._packed, Tensor)
        plain: Tensor = self._packed.to_dense()
        return plain

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., num_rows, in_features] → [..., num_rows, out_features]."""
        y: Tensor = _OPS._linear_pointwise(x, self._packed, self._bias, "none", [], "")  # noqa: SLF001
        return y


def pack(linear: nn.Module) -> nn.Module:
    """A packed stand-in for a bfloat16 linear or Conv1D on CPU, in memory of oneDNN's own."""
    if isinstance(linear, Conv1D):
        return OnednnLinear(linear.weight.t(), linear.bias)
    assert isinstance(linear, nn.Linear)
    return OnednnLinear(linear.weight, linear.bias)
