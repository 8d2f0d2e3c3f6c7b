"""What a new version must show before its name may stand for it, and what one has shown. Imports no torch."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

TOLERANCE = 1e-9  # of means, which are sums of floats
Rate = Mapping[str, float | int]  # as `metrics_of` has it


class _Fixed(BaseModel):
    model_config = ConfigDict(frozen=True)


class GateTask(_Fixed):
    """A task, which is kept elsewhere."""

    digest: str
    num_items: int


class MustKeep(GateTask):
    """What a new version may get worse at, beside the current one, by no more than this."""

    max_drop: float


class Gate(_Fixed):
    """Of one name. No two that were set are the same, as they were not at the same moment."""

    task: GateTask
    min_score: float
    must_keep: MustKeep | None = None
    max_tokens: int
    stop: list[str]
    created: float = Field(default_factory=time.time)  # seconds since the epoch

    @property
    def tasks(self) -> list[GateTask]:
        """In the order in which they are asked."""
        return [self.task, *([] if self.must_keep is None else [self.must_keep])]

    def told(self) -> dict[str, Any]:
        """As the API tells it."""
        return self.model_dump()

    def bars(self, scores: Sequence[tuple[Rate, Rate | None]]) -> list[dict[str, Any]]:
        """Each bar, whether it `is_met`, and else how far it was missed; of each task the new and the current score.

        Without a current score of the first task there is the bar of that alone.
        """
        (new, current), *kept = scores
        short = self.min_score - new["mean"]
        bars = [_bar("min_score", self.task, self.min_score, new, current, short)]
        for new, current in kept if self.must_keep else []:
            assert self.must_keep is not None
            assert current is not None
            most = self.must_keep.max_drop
            bars.append(_bar("max_drop", self.must_keep, most, new, current, current["mean"] - new["mean"] - most))
        return bars


def _bar(name: str, task: GateTask, wanted: float, new: Rate, current: Rate | None, short: float) -> dict[str, Any]:
    is_met = short <= TOLERANCE
    missed_by = 0.0 if is_met else short
    rates = {"score": dict(new), "current_score": None if current is None else dict(current)}
    return {"bar": name, "task": task.digest, "wanted": wanted, **rates, "is_met": is_met, "missed_by": missed_by}


def reason_of(bars: Sequence[Mapping[str, Any]]) -> str | None:
    """Which bars were missed and by how much, in a sentence; None if none was."""
    return "; ".join(map(_words, (bar for bar in bars if not bar["is_met"]))) or None


def _words(bar: Mapping[str, Any]) -> str:
    score, wanted, by = bar["score"]["mean"], bar["wanted"], bar["missed_by"]
    if bar["bar"] == "min_score":
        return f"min_score: its score is {score:.4g}, {by:.4g} below {wanted:.4g}"
    current = bar["current_score"]["mean"]
    drop = f"from {current:.4g} to {score:.4g}, {by:.4g} more than {wanted:.4g}"
    return f"max_drop: its score on what it must keep drops by {current - score:.4g}, {drop}"
