"""The project's own benchmark: its workloads, and what they should come to."""

from dataclasses import dataclass

from swaplora_server.bench.rounds import Ratio


@dataclass(frozen=True, slots=True)
class Workload:
    """Who is asked, by how many requests at a time, on a server with what registered."""

    label: str
    distribution: str
    concurrency: int = 16
    server: str = "16"  # 16 adapters; none; mixed: 16 of mixed ranks; 1000


QUICK = (
    Workload("base, 16 in flight", "base"),
    Workload("one adapter, 16 in flight", "same"),
    Workload("16 adapters, 16 in flight", "distinct"),
    Workload("base, alone", "base", 1),
    Workload("one adapter, alone", "same", 1),
)
FULL = (
    *QUICK,
    Workload("16 adapters by zipf, 16 in flight", "zipf"),
    Workload("base, none registered, 16 in flight", "base", server="none"),
    Workload("16 adapters of mixed ranks, 16 in flight", "distinct", server="mixed"),
    Workload("16 of 1000 registered, 16 in flight", "distinct", server="1000"),
)
RATIOS = (
    Ratio("16 distinct / base", "16 adapters, 16 in flight", "base, 16 in flight", 0.70, 0.80),
    Ratio("one adapter / base", "one adapter, 16 in flight", "base, 16 in flight", 0.85, 0.95),
    Ratio("unused / none registered", "base, 16 in flight", "base, none registered, 16 in flight", 0.98, 0.99),
    Ratio("1000 registered / 16", "16 of 1000 registered, 16 in flight", "16 adapters, 16 in flight", 0.97, 0.99),
)
