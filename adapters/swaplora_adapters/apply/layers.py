"""The wrapped linear: the base's own, plus what the running step's adapters add to it."""

from typing import Any

from torch import Tensor, nn

from swaplora_adapters.apply.activation import Activation


class LoraLinear(nn.Module):
    """y = base(x) + Σ scale · (x Aᵀ) Bᵀ over the step's segments; base rows are left as they are.

    The base is never written: the delta goes into its fresh output. `path` is the module's exact name in the model.
    """

    def __init__(self, path: str, base: nn.Module, activation: Activation, *, is_head: bool) -> None:
        super().__init__()
        self.path = path
        self.base = base
        self.is_head = is_head
        self.number = activation.number(path)
        self._activation = activation

    def __getattr__(self, name: str) -> Any:
        """Let a model read what it would of its own linear (`weight`, `in_features`, …)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., num_rows, in_features] → [..., num_rows, out_features]."""
        y: Tensor = self.base(x)
        self._activation.add_delta(self.number, y, x, is_head=self.is_head)
        return y
