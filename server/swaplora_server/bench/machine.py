"""What the machine can do, measured before a load and never beside it, and what runs on it."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from swaplora_server.version import VERSION

INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "bf16", "i8mm")
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # without one of these its rate says nothing of a kernel
READ_BYTES = 256 << 20  # larger than any cache
SIZE = 1024  # of the square matrices that are multiplied
REPEATS = 5  # of which the fastest counts: others may use the machine too
RATES = (
    f"all cores, the fastest of {REPEATS}: {READ_BYTES >> 20} MiB read; products of square matrices of {SIZE}, "
    "in fp32 by numpy, in bf16 by torch"
)
# torch is imported in a process of its own: the load generator has to stay small
_MULTIPLY_BF16 = f"""
import torch
from swaplora_server.bench.machine import product_rate
matrix = torch.ones(({SIZE}, {SIZE}), dtype=torch.bfloat16)
print(product_rate(lambda: matrix @ matrix))
"""


def measure_machine() -> dict[str, Any]:
    """The processor and its instruction sets, and what all cores of it do; takes some seconds.

    Read bandwidth in GB/s; matrix rates in GFLOP/s, that of bf16 is None where there are no instructions for it.
    """
    cores = len(os.sched_getaffinity(0))
    matrix = np.ones((SIZE, SIZE), np.float32)
    sets = instruction_sets(_cpuinfo())
    return {
        "processor": processor(_cpuinfo()),
        "instruction_sets": sets,
        "cores": cores,
        "read_gb_per_second": READ_BYTES / 1e9 / _read_seconds(cores),
        "fp32_gflop_per_second": product_rate(lambda: matrix @ matrix),
        "bf16_gflop_per_second": _bf16_rate() if BF16.intersection(sets) else None,
        "rates_are": RATES,
    }


def versions() -> dict[str, str]:
    """The generator's own, not the server's."""
    return {"swaplora": VERSION, "python": platform.python_version(), "numpy": version("numpy")}


def processor(cpuinfo: Mapping[str, str]) -> str:
    """Its name, and as names do not tell what is under a hypervisor, its family and model too."""
    name = cpuinfo.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in cpuinfo:
        return name
    return f"{name} (family {cpuinfo['cpu family']}, model {cpuinfo.get('model', '?')})"


def instruction_sets(cpuinfo: Mapping[str, str]) -> list[str]:
    """Those that kernels are written for."""
    has = cpuinfo.get("flags", cpuinfo.get("Features", "")).split()
    return [name for name in INSTRUCTION_SETS if name in has]


def product_rate(multiply: Callable[[], object]) -> float:
    """GFLOP/s of a product of two square matrices of `SIZE`."""
    return 2 * SIZE**3 / 1e9 / _fastest(multiply)


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor."""
    file = Path("/proc/cpuinfo")
    first, _, _ = (file.read_text() if file.exists() else "").partition("\n\n")
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _bf16_rate() -> float | None:
    done = subprocess.run([sys.executable, "-c", _MULTIPLY_BF16], stdout=subprocess.PIPE, text=True)
    return float(done.stdout) if done.returncode == 0 else None  # it has said on stderr why


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
