"""What the scores of a run come to: a rate with its interval for each metric, and a paired test for each two models."""

from collections.abc import Iterator, Sequence
from typing import Any

from swaplora_server.evaluation.metrics import METRICS
from swaplora_server.evaluation.statistics import mcnemar, wilson_interval
from swaplora_server.evaluation.task import Kind

SCORE = "score"  # over all items, of each the first of its metrics
Scores = Sequence[Sequence[float] | None]  # of each item those of METRICS for its kind; None is not asked yet


def metrics_of(kinds: Sequence[Kind], scores: Scores) -> dict[str, dict[str, float | int]]:
    """Of one model, each metric that has an item: `num`, `mean`, `low`, `high`."""
    found: dict[str, list[float]] = {}
    for kind, each in zip(kinds, scores, strict=True):
        if each is not None:
            named = zip((SCORE, *METRICS[kind]), (each[0], *each), strict=True)
            for name, value in named:
                found.setdefault(name, []).append(value)
    return {name: _rate(values) for name, values in found.items()}


def comparisons(models: Sequence[str], scores: Sequence[Scores]) -> Iterator[dict[str, Any]]:
    """Each two models on the items that both have answered, by what only one of them got right."""
    for second in range(len(models)):
        for first in range(second):
            both = [
                (one[0], other[0])
                for one, other in zip(scores[first], scores[second], strict=True)
                if one is not None and other is not None
            ]
            only_first = sum(one > other for one, other in both)
            only_second = sum(one < other for one, other in both)
            yield {
                "models": [models[first], models[second]],
                "metric": SCORE,
                "num": len(both),
                "only_first": only_first,
                "only_second": only_second,
                "p_value": mcnemar(only_first, only_second),
            }


def _rate(values: Sequence[float]) -> dict[str, float | int]:
    mean = min(1.0, sum(values) / len(values))
    low, high = wilson_interval(mean, len(values))
    return {"num": len(values), "mean": mean, "low": low, "high": high}
