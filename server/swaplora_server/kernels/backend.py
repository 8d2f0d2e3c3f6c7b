"""What a family of kernels offers: base linears, the LoRA operation, paged attention, and layers fused into one call.

There are two: `torch` is the definition and runs on any device, `cpu` is C++. `pick_backend` chooses at start.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_adapters.weights.memory import HugePages
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.kernels.rows import LayerAttention, Run, Segment, StepAdapters


class LoraOp(NamedTuple):
    """SGMV (Punica): y[rows] = (y[rows] + scale · (x[rows] Aᵀ) Bᵀ) · column_scale + scale · shift, segment by segment.

    A: [rank, in_features], B: [out_features, rank], each adapter's in its own rank. With segments of one row it is
    BGMV, as while decoding. Prepared once a step, then added module by module.
    """

    # (a step's segments, the paths of all modules by number) → what `add` reads
    prepare: Callable[[Sequence[Segment], Sequence[str]], Any]
    # (y [num_rows, out_features], x [num_rows, in_features], prepared, the module's number)
    add: Callable[[Tensor, Tensor, Any, int], None]


class PagedStep(Protocol):
    """One step over a paged KV cache."""

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the rows' keys and values [num_rows, num_kv_heads, head_dim], then attend causally.

        query: [num_rows, num_heads, head_dim] → [num_rows, num_heads, head_dim of value].
        """


class PagedKV(Protocol):
    """Keys and values of every layer, `block_size` tokens to a block. A layer is allocated when it first writes."""

    @property
    def bytes_per_token(self) -> int:
        """Over all layers seen so far."""

    def step(self, runs: Sequence[Run]) -> PagedStep:
        """A step's view of the cache; `runs` cover its rows in order."""


class RunningStep(NamedTuple):
    """What fused layers read of the step that runs."""

    adapters: StepAdapters
    paged: PagedStep


def _leave_as_it_is(_model: PreTrainedModel, _running: Callable[[], RunningStep]) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Backend:
    """One family of kernels."""

    lora: LoraOp
    paged_kv: Callable[[int, int], PagedKV]  # (number of blocks, block size) →
    linear: Callable[[nn.Module, HugePages], nn.Module]  # what a base linear is exchanged for
    # (an adapter, the paths of all modules by number) → `AdapterWeights.tables`, made once, when it is loaded
    tables: Callable[[AdapterWeights, Sequence[str]], object] = lambda _weights, _paths: None
    # (model, the step that runs) → what undoes it, or None: not exchanged
    wrap: Callable[[PreTrainedModel, Callable[[], RunningStep]], Callable[[], None] | None] = _leave_as_it_is
    description: str = "torch's operations"  # which kernels these are, for who compares figures
