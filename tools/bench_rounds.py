"""The workloads of `make bench`, what they should come to, and what several rounds of them say: medians and ratios."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from swaplora_server.bench.report import Report

Round = Mapping[str, Report]  # what was measured, by the workload's label
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Output tokens per second of the workload `above` over that of `below`: at least `bar`, at best `goal`."""

    label: str
    above: str
    below: str
    bar: float
    goal: float


@dataclass(frozen=True, slots=True)
class Workload:
    """Who is asked, by how many requests at a time, on a server with what registered."""

    label: str
    distribution: str
    concurrency: int = 16
    server: str = "16"  # 16 adapters; none; mixed: 16 of mixed ranks; 1000
    sampling: tuple[str, ...] = ()  # flags of `swaplora bench`; greedy without


QUICK = (
    Workload("base, 16 in flight", "base"),
    Workload("one adapter, 16 in flight", "same"),
    Workload("16 adapters, 16 in flight", "distinct"),
    Workload("base, alone", "base", 1),
    Workload("one adapter, alone", "same", 1),
    Workload("base, temperature 1", "base", sampling=("--temperature", "1")),
    Workload(
        "16 adapters, temperature 1, top_p 0.9, top_k 40",
        "distinct",
        sampling=("--temperature", "1", "--top-p", "0.9", "--top-k", "40"),
    ),
)
FULL = (
    *QUICK,
    Workload("16 adapters by zipf, 16 in flight", "zipf"),
    Workload("base, none registered, 16 in flight", "base", server="none"),
    Workload("16 adapters of mixed ranks, 16 in flight", "distinct", server="mixed"),
    Workload("16 of 1000 registered, 16 in flight", "distinct", server="1000"),
)
RATIOS = (
    Ratio("16 distinct / base", "16 adapters, 16 in flight", "base, 16 in flight", 0.85, 0.92),
    Ratio("one adapter / base", "one adapter, 16 in flight", "base, 16 in flight", 0.85, 0.95),
    Ratio("temperature 1 / greedy, base", "base, temperature 1", "base, 16 in flight", 0.95, 0.98),
    Ratio(
        "top_p 0.9, top_k 40 / greedy, 16 adapters",
        "16 adapters, temperature 1, top_p 0.9, top_k 40",
        "16 adapters, 16 in flight",
        0.90,
        0.95,
    ),
    Ratio("unused / none registered", "base, 16 in flight", "base, none registered, 16 in flight", 0.98, 0.99),
    Ratio("1000 registered / 16", "16 of 1000 registered, 16 in flight", "16 adapters, 16 in flight", 0.97, 0.99),
)


def spread(numbers: Sequence[float]) -> float | None:
    """(max - min) / median; None of a single number, which says nothing of how far others would lie from it."""
    if len(numbers) < 2:
        return None
    return (max(numbers) - min(numbers)) / median(numbers)


def medians(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """For each workload the median over the rounds of its rate and of its times' p50 and p95, in milliseconds."""
    return [
        {
            "workload": label,
            "output_tokens_per_second": median(found := [_rate(each[label]) for each in rounds]),
            "spread": spread(found),
        }
        | {
            f"{name}_{quantile}": median(each[label][name][quantile] for each in rounds)
            for name in ("ttft_ms", "tpot_ms")
            for quantile in ("p50", "p95")
        }
        for label in rounds[0]
    ]


def ratios(rounds: Sequence[Round], wanted: Iterable[Ratio]) -> list[dict[str, Any]]:
    """The median over the rounds of each ratio whose two workloads were both measured, and whether it will do."""
    rows = []
    for ratio in wanted:
        if {ratio.above, ratio.below} <= rounds[0].keys():
            found = [_rate(each[ratio.above]) / _rate(each[ratio.below]) for each in rounds]
            verdict = _verdict(median(found), ratio)
            row = {"ratio": ratio.label, "value": median(found), "spread": spread(found)}
            rows.append(row | {"bar": ratio.bar, "goal": ratio.goal, "verdict": verdict})
    return rows


def tables(medians: Sequence[Row], ratios: Sequence[Row]) -> list[str]:
    """Both as tables in Markdown; the second only if there is a ratio."""
    times = {f"{name}_{quantile}": _tenths for name in ("ttft_ms", "tpot_ms") for quantile in ("p50", "p95")}
    shares = dict.fromkeys(("value", "spread", "bar", "goal"), _hundredths)
    shown = [markdown(medians, {"workload": str, "output_tokens_per_second": _tenths, "spread": _hundredths, **times})]
    return [*shown, markdown(ratios, {"ratio": str, **shares, "verdict": str})] if ratios else shown


def markdown(rows: Sequence[Row], columns: Mapping[str, Callable[[Any], str]]) -> str:
    """A table in Markdown of `rows`; `columns` says which of their keys are shown, and how."""
    lines = [[name.replace("_", " ") for name in columns], ["---"] * len(columns)]
    lines += [[show(row[name]) for name, show in columns.items()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rates(rounds: Sequence[Round], key: str) -> list[float]:
    """What the machine could do before each run, where that was measured."""
    found = (report["machine"][key] for each in rounds for report in each.values())
    return [number for number in found if number is not None]


def machine_range(rounds: Sequence[Round]) -> str:
    """The least and the most that the machine could do before each run: far apart, other work disturbed the figures."""
    reads, products = (rates(rounds, key) for key in ("read_gb_per_second", "fp32_gflop_per_second"))
    return (
        f"machine before the runs: {min(reads):.1f} to {max(reads):.1f} GB/s, "
        f"{min(products):.0f} to {max(products):.0f} GFLOP/s in fp32; figures compare only where these are close"
    )


def _tenths(number: float) -> str:
    return f"{number:.1f}"


def _hundredths(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


def _rate(report: Report) -> float:
    return float(report["output_tokens_per_second"])


def _verdict(value: float, ratio: Ratio) -> str:
    if value >= ratio.goal:
        return "goal met"
    return "bar met" if value >= ratio.bar else "below the bar"
