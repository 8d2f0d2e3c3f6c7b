"""What a family of kernels offers: linears, the LoRA operation, paged attention, layers fused into one call, memory.

There are two: `torch` is the definition and runs on any device, `cpu` is C++. `pick_backend` chooses at start.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_adapters.weights.placement import Placement
from swaplora_adapters.weights.router import Shares, Trace
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.kernels.step import Runs, Segments, StepForm, StepPlan


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer asks of its attention, the same for all of its rows."""

    layer_idx: int
    scaling: float
    softcap: float | None = None  # score → softcap · tanh(score / softcap)
    sinks: Tensor | None = None  # [num_heads]: attention sinks, a logit each that only takes its share
    window: int | None = None  # sliding window: keys a row may look back on, itself included


class LoraStep(Protocol):
    """The LoRA operation over one step's segments, SGMV (Punica); of segments of one row, as while decoding, BGMV.

    y[rows] = (y[rows] + scale · (x[rows] Aᵀ) Bᵀ) · column_scale + scale · shift, segment by segment, with A
    [rank, in_features] and B [out_features, rank], each adapter's in its own rank. In a mixture each row of x Aᵀ is
    multiplied by the row's share of that member: see `Router`.
    """

    def add(self, x: Tensor, outputs: Sequence[tuple[Tensor, int]]) -> None:
        """Add to the outputs of modules that share their input x [num_rows, in_features].

        outputs: of each module y [num_rows, out_features], written in place, and its number.
        """

    def shares(self, trace: Trace) -> Shares | None:
        """What the rows that `trace` watches took of the members of their mixture; None without such rows."""


class PagedStep(Protocol):
    """One step over a paged KV cache."""

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the rows' keys and values [num_rows, num_kv_heads, head_dim], then attend causally.

        query: [num_rows, num_heads, head_dim] → [num_rows, num_heads, head_dim of value].
        """


class WholeAttention(Protocol):
    """Attention of whole inputs, of which no keys and values are kept."""

    def step(self, runs: Runs) -> PagedStep:
        """A step in which every row attends to all rows of its own input, before and after it; runs begin at 0.

        With a window, to those fewer rows away on either side. What a row comes to does not depend on what lies beside
        its input. A step ends with the next.
        """


class StepInputs(NamedTuple):
    """What a forward of the model begins with, on its device."""

    token_ids: Tensor  # [num_rows]
    positions: Tensor  # [num_rows]
    head_rows: Tensor | int  # those that reach the output head; 0, as transformers has it: all of them


class PagedKV(Protocol):
    """Keys and values of every layer, `block_size` tokens to a block. A layer is allocated when it first writes."""

    @property
    def block_size(self) -> int: ...

    @property
    def bytes_per_token(self) -> int:
        """Over all layers seen so far."""

    def step(self, runs: Runs) -> PagedStep:
        """A step's view of the cache."""

    def begin(self, plan: StepPlan) -> tuple[StepInputs, PagedStep]:
        """The same of a whole step, and what its forward begins with."""


class StepRows(NamedTuple):
    """A step's adapters in one of the two row spaces."""

    segments: Segments
    lora: LoraStep | None  # None: nothing is added to a linear


class RunningStep(NamedTuple):
    """The step that runs, as wrapped modules, attention and fused layers read it."""

    plan: StepPlan
    tokens: StepRows
    head: StepRows
    paged: PagedStep


Forward = Callable[[StepInputs, RunningStep], None]  # leaves what it computes where later steps read it


class Graphs(Protocol):
    """Decoding steps that were recorded, and can be launched as one each."""

    def __len__(self) -> int: ...

    def replay(self, plan: StepPlan) -> StepForm:
        """Launch what was recorded for steps like this one over its rows; GRAPH. Launches nothing for any other form.

        What the recorded forward leaves is then that of this step, its rows first.
        """

    def forget_adapters(self) -> None:
        """Keep no adapter alive."""


class Memory(Protocol):
    """Where weights are placed that live and die together."""

    def empty(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """[num_elements], not filled in."""


class Backend(Protocol):
    """One family of kernels."""

    @property
    def description(self) -> str:
        """Which kernels these are, for who compares figures."""

    @property
    def products(self) -> torch.dtype | None:
        """The number format that its linears round their rows to, before they multiply; None: they do not."""

    def memory(self, piece_bytes: int = 64 << 20) -> Memory:
        """For weights, one after the other, in pieces that hold so much or, where that is more, the next of them."""

    def linear(self, linear: nn.Module, memory: Memory) -> nn.Module:
        """What a linear is exchanged for: one that computes the same, its weights in `memory`, or itself."""

    @property
    def joins(self) -> bool:
        """Whether linears that share their input are to be multiplied at once."""

    @property
    def placement(self) -> Placement | None:
        """How an adapter's factors lie in memory; None: as plain tensors."""

    def tables(self, weights: AdapterWeights, paths: Sequence[str]) -> object:
        """What this family reads of an adapter, for `AdapterWeights.tables`; made once, when it is loaded.

        `paths` are those of all modules by number.
        """

    def lora(self, segments: Segments) -> LoraStep:
        """The LoRA operation over segments of prepared adapters, each of which adds to some linear."""

    def paged_kv(self, num_blocks: int, block_size: int) -> PagedKV:
        """Room for blocks 1 to `num_blocks`, beside block 0, which is nobody's."""

    def whole_attention(self) -> WholeAttention:
        """Attention of an encoder's inputs."""

    def stepping(self) -> AbstractContextManager[object]:
        """Around each step of an engine, and what it decides before and after it."""

    def graphs(self, kv: PagedKV, forward: Forward, sizes: Sequence[int]) -> Graphs | None:
        """Record `forward` of decoding steps over `kv`, of each of these numbers of rows, ascending.

        None: this family launches every operation by itself. Raises RuntimeError for a model that cannot be recorded.
        """

    def wrap(self, model: PreTrainedModel, running: Callable[[], RunningStep]) -> Callable[[], None] | None:
        """Exchange layers of `model` for fused ones, which read the step from `running`; what undoes it.

        None: they are left as they are. Nobody takes the fused ones on trust: the proof at start tries them.
        """
