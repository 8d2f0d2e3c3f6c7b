"""`make simulate`: routing by affinity beside other ways, on paper: the tables and the picture of docs/scaling.md.

Everything is drawn from seeds, so that two runs say the same, but for what a choice takes of a processor.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from figure import Panel, figure_svg
from simulation import Figures, Traffic, simulate
from ways import POLICIES

REPLICAS = (2, 4, 8, 16, 32, 64)
console = Console(soft_wrap=True, highlight=False)
Row = tuple[str, Traffic]
Found = dict[tuple[str, str], Figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", type=Path, help="where the picture is written")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    arguments = parser.parse_args()
    usual = Traffic(warm_up=6_000, counted=4_000) if arguments.quick else Traffic()
    by_replicas = _run(((f"{count}", replace(usual, num_replicas=count)) for count in REPLICAS), POLICIES)
    console.print(_table("replicas", by_replicas))
    variants: list[Row] = [
        *((f"zipf {exponent}", replace(usual, exponent=exponent)) for exponent in (0.8, 1.2)),
        *((f"told every {period:g} s", replace(usual, period=period)) for period in (0.1, 10.0)),
        *((f"{count} routers", replace(usual, num_routers=count)) for count in (1, 8)),
        *((f"{count} adapters fit", replace(usual, memory=count)) for count in (100, 1500)),
        ("half loaded", replace(usual, utilization=0.5)),
    ]
    console.print(_table("8 replicas, and", _run(variants, POLICIES)))
    lost = replace(usual, loses_one_at=usual.warm_up, counted=usual.counted // 10)
    come = replace(usual, has_one_more_at=usual.warm_up, counted=usual.counted // 10)
    console.print(_table("8 replicas, right after", _run([("one is lost", lost), ("one more comes", come)], POLICIES)))
    if arguments.svg is not None:
        arguments.svg.write_text(_picture(by_replicas))


def _run(rows: Iterable[Row], policies: Iterable[str]) -> Found:
    jobs = [(label, name, traffic) for label, traffic in rows for name in policies]
    done = track(jobs, "simulating", console=Console(stderr=True), transient=True)
    return {(label, name): simulate(traffic, POLICIES[name]) for label, name, traffic in done}


def _table(what: str, found: Found) -> str:
    """In Markdown: a line for each run."""
    head = (
        f"| {what} | way | in memory | loads of 100 | busiest to mean | waits p50, p99 | whole: mean, p99 | a choice |"
    )
    lines = [head, "| --- " * (head.count("|") - 1) + "|"]
    for (label, name), each in found.items():
        waits = f"{each.wait_p50 * 1e3:.0f}, {each.wait_p99 * 1e3:.0f} ms"
        whole = f"{each.total_mean:.2f}, {each.total_p99:.2f} s"
        lines.append(
            f"| {label} | {name} | {each.hit_rate:.1%} | {each.loads_per_100:.1f} | {each.imbalance:.2f} "
            f"| {waits} | {whole} | {each.choose_us:.0f} µs |"
        )
    return "\n".join(lines) + "\n"


def _picture(found: Found) -> str:
    def lines(read: str) -> dict[str, Sequence[float]]:
        return {name: [getattr(found[f"{count}", name], read) for count in REPLICAS] for name in POLICIES}

    panels = [
        Panel("loads of adapters by 100 requests, over the number of replicas", 0, 60, lines("loads_per_100")),
        Panel("requests of the busiest replica, to the mean", 1, 2, lines("imbalance")),
        Panel("seconds from a request to its end, mean", 2, 6, lines("total_mean")),
    ]
    return figure_svg("Routing of 10,000 adapters by zipf's law on 2 to 64 replicas", REPLICAS, panels)


if __name__ == "__main__":
    main()
