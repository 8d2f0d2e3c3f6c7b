"""A report as a person reads it."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from swaplora_server.bench.report import Report
from swaplora_server.printable import printable

TIMES = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "gap": "gap_ms", "whole answer": "latency_ms"}


def summary(report: Report) -> list[str]:
    """The figures that are single numbers, a line for each group of them."""
    lines = [
        f"{report['completed']} requests in {report['seconds']:.1f} s, {report['failed']} failed, "
        f"{report['requests_per_second']:.2f} requests/s",
        f"{report['output_tokens_per_second']:.1f} output tokens/s, {report['total_tokens_per_second']:.1f} in all; "
        f"{report['cached_tokens']} of {report['prompt_tokens']} prompt tokens cached",
    ]
    if goodput := report["goodput"]:
        lines.append(f"goodput {goodput['requests_per_second']:.2f} requests/s, {_promises(goodput)}")
    if report["short"]:
        lines.append(f"{report['short']} answers are shorter than was asked for")
    if report["first_failure"]:
        lines.append(f"the first failure: {report['first_failure']}")
    return lines


def times_table(report: Report) -> Table:
    """Milliseconds by percentile."""
    table = Table("milliseconds", "p50", "p95", "p99", "max", box=None)
    for title, key in TIMES.items():
        table.add_row(title, *_numbers(report[key]))
    return table


def adapters_table(report: Report) -> Table:
    """A row for each adapter that was asked."""
    table = Table("adapter", "requests", "failed", "output tokens/s", "good", "TTFT p50", "p95", "TPOT p50", "p95")
    table.box = None
    for adapter in report["adapters"]:
        good = str(adapter["goodput"]["requests"]) if adapter["goodput"] else "-"
        counts = [str(adapter["completed"]), str(adapter["failed"]), f"{adapter['output_tokens_per_second']:.1f}", good]
        times = [*_numbers(adapter["ttft_ms"])[:2], *_numbers(adapter["tpot_ms"])[:2]]
        table.add_row(Text(printable(adapter["name"])), *counts, *times)
    return table


def notes(report: Report) -> list[str]:
    """What the figures mean, and where they were taken."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return [
        f"gap: {report['gaps_are']}",
        f"the generator took {report['generator']['cpu_share']:.0%} of one core",
        machine_line(report["machine"]),
        server_line(report["server"]),
        f"the generator: {versions}",
    ]


def machine_line(machine: Mapping[str, Any]) -> str:
    """What the machine can do."""
    bf16 = machine["bf16_gflop_per_second"]
    return (
        f"this machine: {machine['processor']}, {machine['cores']} cores, "
        f"{' '.join(machine['instruction_sets']) or 'no instruction sets that matter'}; "
        f"{machine['read_gb_per_second']:.1f} GB/s, {machine['fp32_gflop_per_second']:.0f} GFLOP/s in fp32, "
        f"{'no instructions for' if bf16 is None else f'{bf16:.0f} GFLOP/s in'} bf16 ({machine['rates_are']})"
    )


def server_line(server: Mapping[str, str | None]) -> str:
    """Which kernels answered, by the server's own word."""
    if server["kernels"] is None:
        return "the server does not say which kernels it has"
    return f"the server: {server['version']}, {server['device']}, {server['dtype']}; kernels: {server['kernels']}"


def _numbers(quantiles: Mapping[str, float] | None) -> list[str]:
    return [f"{number:.1f}" for number in quantiles.values()] if quantiles else ["-"] * 4


def _promises(goodput: Mapping[str, Any]) -> str:
    bounds = {"TTFT": goodput["slo_ttft_ms"], "TPOT": goodput["slo_tpot_ms"]}
    kept = " and ".join(f"{name} within {bound:g} ms" for name, bound in bounds.items() if bound is not None)
    return f"{goodput['requests']} requests with {kept}"
