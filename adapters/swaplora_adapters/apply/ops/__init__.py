"""lora_delta in its forms. Each adds, in place and per segment, y[rows] += scale · (x[rows] Aᵀ) Bᵀ."""

from collections.abc import Callable, Sequence

from torch import Tensor

from swaplora_adapters.apply.activation import ModuleSegment

LoraDelta = Callable[[Tensor, Tensor, Sequence[ModuleSegment]], None]
