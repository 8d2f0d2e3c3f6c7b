"""What kernels read of a step: which of its rows belong to which sequence, and which adapters apply to them.

A step packs the rows of many sequences one after the other into [1, num_rows]. Attention sees each sequence as a `Run`
of rows; the LoRA operation sees `Segment`s, so that "rows 4 to 7 use A at 1.0 and B at 0.4" is two over the same rows.
Base rows are in no segment and cost nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from swaplora_adapters.weights.served import AdapterWeights


@dataclass(frozen=True, slots=True)
class Run:
    """Rows [start, stop) of a step: the tokens of one sequence from position `first` on."""

    start: int
    stop: int
    first: int
    blocks: Sequence[int]  # the sequence's block table

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def length(self) -> int:
        """Tokens of the sequence up to the run's end."""
        return self.first + self.num_rows


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer asks of its attention, the same for all of its rows."""

    layer_idx: int
    scaling: float
    softcap: float | None = None  # score → softcap · tanh(score / softcap)
    sinks: Tensor | None = None  # [num_heads]: attention sinks, a logit each that only takes its share
    window: int | None = None  # sliding window: keys a row may look back on, itself included


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start` to `stop` of a packed step use one adapter at `scale`. Segments are in the order of their rows."""

    weights: AdapterWeights
    scale: float
    start: int
    stop: int


class StepRows:
    """A step's adapters in one of a model's two row spaces: every token, or the rows that reach the output head."""

    def __init__(self, segments: Sequence[Segment], deltas: Any) -> None:
        """`deltas`: as the backend's LoRA operation prepared them, or None where nothing is added to a linear."""
        self.deltas = deltas
        self.replacing = [segment for segment in segments if segment.weights.replaced]
        self.embedding = [segment for segment in segments if segment.weights.embeddings]


class StepAdapters(NamedTuple):
    """The segments of one step, in both row spaces."""

    tokens: StepRows
    head: StepRows
    logits_to_keep: Sequence[int]  # the rows of `tokens` that `head` has, in ascending order; as in transformers
