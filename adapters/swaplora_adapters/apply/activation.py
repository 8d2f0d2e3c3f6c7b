"""One step's adapters: which rows use which adapter at which scale, settled once and read by every wrapped layer.

A step packs the rows of many sequences one after the other. Each sequence is a run of rows, so "rows 4 to 7 use A at
1.0 and B at 0.4" is two segments over the same run. Base rows stand in no segment and cost nothing; a module that an
adapter does not target has no factors in it, so there is nothing to zero and nothing stale.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from swaplora_adapters.artifact.served import AdapterWeights


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start` to `stop` of a packed step add `scale` times the delta of one adapter."""

    weights: AdapterWeights
    scale: float
    start: int
    stop: int


class LoraOp(NamedTuple):
    """One form of y[rows] += scale · (x[rows] Aᵀ) Bᵀ: prepared once a step, then added module by module."""

    # (a step's segments, the paths of all modules by number) → what `add` reads
    prepare: Callable[[Sequence[Segment], Sequence[str]], Any]
    # (y [num_rows, out_features], x [num_rows, in_features], prepared, the module's number)
    add: Callable[[Tensor, Tensor, Any, int], None]


class StepAdapters:
    """The segments of one step, in a model's two row spaces: every token, and the rows that reach the output head.

    Each is as the form in use prepared it, or None where the base alone is at work.
    """

    def __init__(self, tokens: Any, head: Any) -> None:
        self.tokens = tokens
        self.head = head


class Activation:
    """The one place that wrapped layers look at to learn what the running step is made of, and add it."""

    def __init__(self, op: LoraOp) -> None:
        self._op = op
        self._paths: list[str] = []
        self._step: StepAdapters | None = None

    def number(self, path: str) -> int:
        """Give the module at `path` its number, before the first step."""
        self._paths.append(path)
        return len(self._paths) - 1

    def plan(self, tokens: Sequence[Segment], head: Sequence[Segment]) -> StepAdapters:
        """A step's segments, to `use` for as many passes as nothing about them changes."""
        return StepAdapters(*(self._op.prepare(part, self._paths) if part else None for part in (tokens, head)))

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

    def add_delta(self, number: int, y: Tensor, x: Tensor, *, is_head: bool) -> None:
        """Add to y [..., out_features] what the running step's adapters make of x [..., in_features] in a module.

        Raises RuntimeError outside of `use`.
        """
        prepared = self.step.head if is_head else self.step.tokens
        if prepared is not None:
            self._op.add(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), prepared, number)
