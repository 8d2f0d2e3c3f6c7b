"""What the machine can do, measured before a load and never beside it, and what runs on it."""

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

READ_BYTES = 256 << 20  # larger than any cache
SIZE = 1024  # of the square matrices that are multiplied
REPEATS = 5  # of which the fastest counts: others may use the machine too


def measure_machine() -> dict[str, Any]:
    """Processor, cores, read bandwidth in GB/s and fp32 matrix rate in GFLOP/s of all cores; takes about a second."""
    cores = len(os.sched_getaffinity(0))
    matrix = np.ones((SIZE, SIZE), np.float32)
    return {
        "processor": _processor(),
        "cores": cores,
        "read_gb_per_second": READ_BYTES / 1e9 / _read_seconds(cores),
        "fp32_gflop_per_second": 2 * SIZE**3 / 1e9 / _fastest(lambda: matrix @ matrix),
    }


def versions() -> dict[str, str]:
    """The generator's own, not the server's."""
    return {"swaplora": version("swaplora"), "python": platform.python_version(), "numpy": version("numpy")}


def _read_seconds(cores: int) -> float:
    """Each core's thread reads its own part; numpy lets go of the interpreter meanwhile."""
    parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), cores)
    with ThreadPoolExecutor(cores) as threads:
        return _fastest(lambda: list(threads.map(np.bitwise_or.reduce, parts)))


def _fastest(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
