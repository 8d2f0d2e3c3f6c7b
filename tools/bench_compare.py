"""Results of `make bench` beside each other, and as the table of a processor in docs/benchmarks.md."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from bench_rounds import markdown, medians, rates

Results = Mapping[str, Any]  # what `make bench` writes
ALONE = "the run"  # what a report of `swaplora bench` is called here
OWN = {"url", "seed"}  # what two runs of one workload need not have in common
FAR_APART = 1.1  # of two medians of what the machine could do


def read_results(file: Path) -> Results:
    """What `make bench` wrote, or `swaplora bench --json`. Raises SystemExit for what is neither."""
    try:
        content = json.loads(file.read_text())
        found = content if "rounds" in content else _alone(content)
        conditions(found)
    except OSError as error:
        raise SystemExit(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{file} holds no results: make some with make bench ARGS='--json FILE'") from error
    return found


def conditions(results: Results) -> dict[str, str]:
    """What two runs must have in common for a ratio of theirs to say what a change of the program did."""
    reports = [report for each in results["rounds"] for report in each.values()]
    machines, servers = ([report[key] for report in reports] for key in ("machine", "server"))
    return {
        "processor": _words(machine["processor"] for machine in machines),
        "instruction sets": _words(" ".join(machine["instruction_sets"]) for machine in machines),
        "cores": _words(str(machine["cores"]) for machine in machines),
        "kernels": _words(str(server["kernels"]) for server in servers),
        "number format": _words(f"{server['device']}, {server['dtype']}" for server in servers),
        "base": results["base"],
        "flags of the server": " ".join(results["server_flags"]),
    }


def compare(before: Results, after: Results) -> Iterator[str]:
    """What the two do not have in common, loudly, and then the ratios of each workload that both have measured."""
    yield from _differences(before, after)
    first, second = ({row["workload"]: row for row in results["medians"]} for results in (before, after))
    rows = [
        {
            "workload": label,
            "before, tok/s": first[label]["output_tokens_per_second"],
            "after, tok/s": second[label]["output_tokens_per_second"],
            "after / before": _quotient(first[label], second[label], "output_tokens_per_second"),
            "of TTFT p50": _quotient(first[label], second[label], "ttft_ms_p50"),
            "of TPOT p50": _quotient(first[label], second[label], "tpot_ms_p50"),
        }
        for label in first
        if label in second
    ]
    if not rows:
        raise SystemExit("the two have no workload in common")
    speeds = dict.fromkeys(("before, tok/s", "after, tok/s"), _rate)
    shares = dict.fromkeys(("after / before", "of TTFT p50", "of TPOT p50"), "{:.2f}".format)
    yield markdown(rows, {"workload": str, **speeds, **shares})
    for which, one, other in (("first", first, second), ("second", second, first)):
        if missing := [label for label in one if label not in other]:
            yield f"only in the {which}: {'; '.join(missing)}"


def section(results: Results) -> Iterator[str]:
    """What docs/benchmarks.md says of a processor: where and with what it was measured, the table, the ratios."""
    found, rounds = conditions(results), results["rounds"]
    bf16 = rates(rounds, "bf16_gflop_per_second")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield (
        f"{found['processor']}, {found['cores']} cores: {found['instruction sets'] or 'none of the instruction sets'}. "
        f"Beside the runs {_range(rates(rounds, 'read_gb_per_second'))} GB/s, "
        f"{_range(rates(rounds, 'fp32_gflop_per_second'))} GFLOP/s in fp32 and "
        f"{_range(bf16) if bf16 else 'none'} in bf16 were measured.\n"
        f"Base {found['base']}, {found['number format']}; kernels: {found['kernels']}; {versions}. "
        f"{len(rounds)} rounds{f', flags `{flags}`' if (flags := found['flags of the server']) else ''}.\n"
    )
    shown: dict[str, Any] = {"workload": str, "output tok/s": _rate, "between rounds": _percent}
    shown |= dict.fromkeys(("TTFT p50", "TTFT p95", "TPOT p50", "TPOT p95"), _time)
    keys = (
        "workload",
        "output_tokens_per_second",
        "spread",
        "ttft_ms_p50",
        "ttft_ms_p95",
        "tpot_ms_p50",
        "tpot_ms_p95",
    )
    yield markdown([dict(zip(shown, map(row.get, keys), strict=True)) for row in results["medians"]], shown)
    if said := [f"{row['ratio']} {row['value']:.2f}" for row in results["ratios"]]:
        yield f"Ratios: {', '.join(said)}."


def _alone(report: Mapping[str, Any]) -> Results:
    rounds = [{ALONE: report}]
    base = str(report["options"]["base"])
    return {
        "base": base,
        "server_flags": [],
        "versions": report["versions"],
        "rounds": rounds,
        "medians": medians(rounds),
        "ratios": [],
    }


def _differences(before: Results, after: Results) -> Iterator[str]:
    first, second = conditions(before), conditions(after)
    for name, value in first.items():
        if value != second[name]:
            yield _loud(f"not the same {name}", value, second[name])
    for key, unit in (("read_gb_per_second", "GB/s"), ("fp32_gflop_per_second", "GFLOP/s in fp32")):
        found = [median(rates(results["rounds"], key)) for results in (before, after)]
        if max(found) > FAR_APART * min(found):
            yield _loud("the machine was not as fast", *(f"{rate:.0f} {unit}" for rate in found))
    first_options, second_options = _options(before), _options(after)
    for label, options in first_options.items():
        if options != (others := second_options.get(label, options)):
            yield _loud(f"not asked the same, {label}", *_unlike(options, others))


def _options(results: Results) -> dict[str, dict[str, Any]]:
    """What each workload was, but for what is each run's own."""
    return {
        label: {name: value for name, value in report["options"].items() if name not in OWN}
        for label, report in results["rounds"][0].items()
    }


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str]:
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    told = [", ".join(f"{name} {options.get(name)}" for name in names) for options in (first, second)]
    return told[0], told[1]


def _loud(what: str, before: str, after: str) -> str:
    return f"!!! {what.upper()}: {before or 'none'} | {after or 'none'}"


def _words(values: Iterator[str]) -> str:
    """Each of them once."""
    return " and ".join(dict.fromkeys(values))


def _quotient(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> float:
    return float(after[key] / before[key])


def _range(numbers: list[float]) -> str:
    low, high = (f"{number:.0f}" for number in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def _rate(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}".replace("%", " %")


def _time(milliseconds: float) -> str:
    number, unit = (milliseconds, "ms") if milliseconds < 99.5 else (milliseconds / 1e3, "s")
    return f"{number:.0f} {unit}" if number >= 9.95 else f"{number:.2g} {unit}"
