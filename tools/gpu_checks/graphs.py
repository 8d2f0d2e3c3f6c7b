"""Decoding steps as a server records them at start: how many, how long it takes and how much memory, and the proof."""

import time
from typing import Any

from structlog.testing import capture_logs

from gpu_checks.card import Card
from gpu_checks.report import Report
from swaplora_server.base.base_model import BaseModel
from swaplora_server.base.decode_graphs import record_steps
from swaplora_server.base.device_memory import graph_bytes
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.kernels.cuda.graphs.buckets import bucket_sizes

BLOCK = 16


def measure_graphs(report: Report, card: Card, name: str, base: BaseModel) -> dict[str, Any]:
    """Of all buckets; a base that cannot be recorded, or is not what it was, is a problem."""
    max_rows, num_blocks = (4, 40) if card.is_dry else (64, 4096)
    reckoned = 0
    if card.is_gpu:
        largest = base.runner(num_blocks, BLOCK)
        reckoned = graph_bytes(lambda: largest.record([max_rows]), card.device, len(bucket_sizes(max_rows)))
        del largest
    began = time.perf_counter()
    with capture_logs() as logs:
        recorded = record_steps(base, base.runner(num_blocks, BLOCK), BlockPool(num_blocks, BLOCK), max_rows)
    seconds = time.perf_counter() - began
    for entry in logs:
        if entry["log_level"] == "warning":
            report.problem(f"{name}: {entry['event']}: {entry['reason']}")
    if recorded is None:
        report.finding(f"{name}: no steps are recorded")
        return {}
    report.row(f"{name}, {recorded.num_graphs} graphs recorded and proven", f"{seconds:.1f} s")
    report.row(f"{name}, their memory, and what is reckoned", f"{recorded.num_bytes} B, {reckoned} B")
    return {"graphs": recorded.num_graphs, "bytes": recorded.num_bytes, "reckoned": reckoned, "recording": seconds}
