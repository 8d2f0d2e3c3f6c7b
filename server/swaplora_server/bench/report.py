"""Answers as figures: rates, times to and between tokens, and how many requests met what was promised."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from swaplora_server.bench.answer import Answer
from swaplora_server.bench.load import Load
from swaplora_server.bench.options import Options

Report = Mapping[str, Any]  # as it is printed in JSON

GAPS = "between two chunks of a stream that brought text or token ids; a chunk may hold several tokens"


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of ascending numbers, linear between the two nearest, as numpy has it. At least one number."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def quantiles(seconds: Iterable[float]) -> dict[str, float] | None:
    """p50, p95, p99 and the largest, in milliseconds; None of nothing."""
    ordered = sorted(1e3 * number for number in seconds)
    if not ordered:
        return None
    return {f"p{percent}": percentile(ordered, percent) for percent in (50, 95, 99)} | {"max": ordered[-1]}


@dataclass(frozen=True, slots=True)
class Objective:
    """What was promised of each request, in milliseconds; None is nothing."""

    ttft: float | None
    tpot: float | None

    def is_met(self, answer: Answer) -> bool:
        """Whether a whole answer kept both promises. One of a single token has no TPOT that could be too long."""
        in_time = self.ttft is None or answer.ttft * 1e3 <= self.ttft
        return in_time and (self.tpot is None or (answer.tpot or 0.0) * 1e3 <= self.tpot)


def report(load: Load, options: Options, *, per_adapter: bool) -> Report:
    """Every figure of a run. Times are milliseconds and rates per second, over the whole run.

    Only whole answers count, but for `failed`. `short` is how many of them have fewer tokens than were asked for.
    `generator.cpu_share` is what the generator itself took of one core.
    """
    objective = Objective(options.slo_ttft, options.slo_tpot)
    figures = _figures(load.answers, load.seconds, objective) | {
        "first_failure": next((answer.failure for answer in load.answers if answer.failure), None),
        "gaps_are": GAPS,
        "generator": {"cpu_share": load.cpu_seconds / load.seconds},
    }
    if per_adapter:
        figures["adapters"] = _by_adapter(load, options, objective)
    return figures


def _figures(answers: Iterable[Answer], seconds: float, objective: Objective) -> dict[str, Any]:
    every = list(answers)
    whole = [answer for answer in every if answer.failure is None]
    return {
        "completed": len(whole),
        "failed": len(every) - len(whole),
        "seconds": seconds,
        **_tokens(whole, seconds),
        "requests_per_second": len(whole) / seconds,
        "ttft_ms": quantiles(answer.ttft for answer in whole),
        "tpot_ms": quantiles(tpot for answer in whole if (tpot := answer.tpot) is not None),
        "gap_ms": quantiles(chain.from_iterable(answer.gaps for answer in whole)),
        "latency_ms": quantiles(answer.latency for answer in whole),
        "goodput": _goodput(whole, seconds, objective),
    }


def _tokens(whole: Sequence[Answer], seconds: float) -> dict[str, Any]:
    def total(count: Callable[[Answer], int]) -> int:
        return sum(map(count, whole))

    prompt, output = total(lambda answer: answer.num_prompt_tokens), total(lambda answer: answer.num_output_tokens)
    chunks = total(lambda answer: len(answer.stamps))
    return {
        "short": total(lambda answer: answer.num_output_tokens < answer.request.num_output_tokens),
        "prompt_tokens": prompt,
        "cached_tokens": total(lambda answer: answer.num_cached_tokens),
        "output_tokens": output,
        "tokens_per_chunk": output / chunks if chunks else None,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (prompt + output) / seconds,
    }


def _goodput(whole: Sequence[Answer], seconds: float, objective: Objective) -> dict[str, Any] | None:
    if objective == Objective(None, None):
        return None
    good = sum(map(objective.is_met, whole))
    promised = {"slo_ttft_ms": objective.ttft, "slo_tpot_ms": objective.tpot}
    return {**promised, "requests": good, "requests_per_second": good / seconds}


def _by_adapter(load: Load, options: Options, objective: Objective) -> list[dict[str, Any]]:
    """The same figures of each adapter that was asked, or of the base."""
    groups: dict[int | None, list[Answer]] = {}
    for answer in load.answers:
        groups.setdefault(answer.request.adapter, []).append(answer)
    return [
        {"name": options.base if adapter is None else options.adapters[adapter]}
        | _figures(groups[adapter], load.seconds, objective)
        for adapter in sorted(groups, key=lambda adapter: -1 if adapter is None else adapter)
    ]
