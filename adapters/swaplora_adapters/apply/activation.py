"""One step's adapters: which rows use which adapter at which scale, settled once and read by every wrapped layer.

A step packs the rows of many sequences one after the other. Each sequence is a run of rows, so "rows 4 to 7 use A at 1.0
and B at 0.4" is two segments over the same run. Base rows stand in no segment and cost nothing; a module that an adapter
does not target finds no segment of it, so there is nothing to zero and nothing stale.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

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


class StepAdapters:
    """The segments of one step, in the two row spaces a model has: every token, and the rows that reach the output head."""

    def __init__(self, tokens: Sequence[Segment], head: Sequence[Segment]) -> None:
        self._tokens = tuple(tokens)
        self._head = tuple(head)
        self._by_module: dict[str, tuple[ModuleSegment, ...]] = {}

    def of_module(self, path: str, *, is_head: bool) -> tuple[ModuleSegment, ...]:
        """The segments whose adapter targets the module at `path`; found once, then remembered for the step."""
        found = self._by_module.get(path)
        if found is None:
            found = tuple(_seen_from(path, self._head if is_head else self._tokens))
            self._by_module[path] = found
        return found


def _seen_from(path: str, segments: Sequence[Segment]) -> Iterator[ModuleSegment]:
    for segment in segments:
        module = segment.weights.modules.get(path)
        if module is not None:
            yield ModuleSegment(module.lora_A, module.lora_B, segment.scale, segment.start, segment.stop)


NO_ADAPTERS = StepAdapters((), ())


class Activation:
    """The one place that wrapped layers look at to learn what the running step is made of."""

    def __init__(self) -> None:
        self._step: StepAdapters | None = None

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

    def segments_of(self, path: str, *, is_head: bool) -> tuple[ModuleSegment, ...]:
        """What the running step adds to the module at `path`. Raises RuntimeError outside of `use`."""
        if self._step is None:
            raise RuntimeError("a wrapped layer ran outside of a step")
        return self._step.of_module(path, is_head=is_head)
