"""One step's adapters: which rows use which adapter at which scale, settled once and read by every wrapped layer.

A step packs the rows of many sequences one after the other. Each sequence is a run of rows, so "rows 4 to 7 use A at
1.0 and B at 0.4" is two segments over the same run. Base rows stand in no segment and cost nothing; a module that an
adapter does not target finds no segment of it, so there is nothing to zero and nothing stale.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from swaplora_adapters.artifact.weights import AdapterWeights


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start` to `stop` of a packed step add `scale` times the delta of one adapter."""

    weights: AdapterWeights
    scale: float
    start: int
    stop: int


class ModuleSegment(NamedTuple):
    """A segment seen from one module: the two factors it multiplies these rows by."""

    lora_A: Tensor  # [rank, in_features]
    lora_B: Tensor  # [out_features, rank], scaling folded in
    scale: float
    start: int
    stop: int


class LoraOp(NamedTuple):
    """One form of y[rows] += scale · (x[rows] Aᵀ) Bᵀ: prepared once a step, then added where it applies."""

    prepare: Callable[[Sequence[ModuleSegment]], Any]
    add: Callable[[Tensor, Tensor, Any], None]  # (y [num_rows, out_features], x [num_rows, in_features], prepared)


class StepAdapters:
    """The segments of one step, in a model's two row spaces: every token, and the rows that reach the output head."""

    def __init__(self, tokens: Sequence[Segment], head: Sequence[Segment], op: LoraOp) -> None:
        self._tokens = tuple(tokens)
        self._head = tuple(head)
        self._op = op
        self._by_module: dict[str, Any] = {}

    def of_module(self, path: str, *, is_head: bool) -> Any:
        """The prepared segments whose adapters target the module at `path`, or None; found once, then remembered."""
        if not self._tokens:
            return None
        if path not in self._by_module:
            segments = list(_seen_from(path, self._head if is_head else self._tokens))
            self._by_module[path] = self._op.prepare(segments) if segments else None
        return self._by_module[path]


def _seen_from(path: str, segments: Sequence[Segment]) -> Iterator[ModuleSegment]:
    for segment in segments:
        module = segment.weights.modules.get(path)
        if module is not None:
            yield ModuleSegment(module.lora_A, module.lora_B, segment.scale, segment.start, segment.stop)


class Activation:
    """The one place that wrapped layers look at to learn what the running step is made of, and add it."""

    def __init__(self, op: LoraOp) -> None:
        self._op = op
        self._step: StepAdapters | None = None

    def plan(self, tokens: Sequence[Segment], head: Sequence[Segment]) -> StepAdapters:
        """A step's segments, to `use` for as many passes as nothing about them changes."""
        return StepAdapters(tokens, head, self._op)

    @contextmanager
    def use(self, step: StepAdapters) -> Iterator[None]:
        """Hold `step` for the duration of one forward pass; refuses to nest and always clears."""
        if self._step is not None:
            raise RuntimeError("an activation is already in use: steps do not nest")
        self._step = step
        try:
            yield
        finally:
            self._step = None

    def add_delta(self, path: str, y: Tensor, x: Tensor, *, is_head: bool) -> None:
        """Add to y [..., out_features] what the running step's adapters make of x [..., in_features] at `path`.

        Raises RuntimeError outside of `use`.
        """
        if self._step is None:
            raise RuntimeError("a wrapped layer ran outside of a step")
        prepared = self._step.of_module(path, is_head=is_head)
        if prepared is not None:
            self._op.add(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), prepared)
