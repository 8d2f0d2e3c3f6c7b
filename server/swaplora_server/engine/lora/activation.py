"""One step's adapters: which rows use which adapter at which scale, settled once and read by every wrapped layer.

A step packs the rows of many sequences one after the other. Each sequence is a run of rows, so "rows 4 to 7 use A at
1.0 and B at 0.4" is two segments over the same run. Base rows stand in no segment and cost nothing; a module that an
adapter does not target has no factors in it, so there is nothing to zero and nothing stale.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from swaplora_server.kernels.backend import LoraOp
from swaplora_server.kernels.rows import Segment, StepAdapters, StepRows


class Activation:
    """The one place that wrapped layers look at to learn what the running step is made of, and add it."""

    def __init__(self, op: LoraOp) -> None:
        self._op = op
        self._paths: list[str] = []
        self._step: StepAdapters | None = None

    @property
    def paths(self) -> Sequence[str]:
        """Of all wrapped modules, by number."""
        return self._paths

    def number(self, path: str) -> int:
        """Give the module at `path` its number, before the first step."""
        self._paths.append(path)
        return len(self._paths) - 1

    def plan(self, tokens: Sequence[Segment], head: Sequence[Segment], logits_to_keep: Sequence[int]) -> StepAdapters:
        """A step's segments, to `use` for as many passes as nothing about them changes."""
        return StepAdapters(self._plan(tokens), self._plan(head), logits_to_keep)

    def _plan(self, segments: Sequence[Segment]) -> StepRows:
        adding = [segment for segment in segments if segment.weights.modules]
        return StepRows(segments, self._op.prepare(adding, self._paths) if adding else None)

    @property
    def step(self) -> StepAdapters:
        """The running step. Raises RuntimeError outside of `use`."""
        if self._step is None:
            raise RuntimeError("a wrapped layer ran outside of a step")
        return self._step

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

    def add_delta(self, number: int, y: Tensor, x: Tensor, rows: StepRows) -> None:
        """Add to y [..., out_features] what the adapters of `rows` make of x [..., in_features] in a module."""
        if rows.deltas is not None:
            self._op.add(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), rows.deltas, number)
