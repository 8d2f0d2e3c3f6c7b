"""The processor, its memory and what limits them, as Linux tells it."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from swaplora_server.banner import human_bytes
from swaplora_server.bench.machine import instruction_sets, processor
from swaplora_server.config import Settings
from swaplora_server.doctor.finding import Finding
from swaplora_server.host_memory import allowed_bytes, read_text, total_bytes

MIN_FILES = 4096
_DEFAULT_KV_BYTES = 2**30  # on a CPU, unless the settings say otherwise


def machine_findings(settings: Settings, root: Path = Path("/")) -> Iterator[Finding]:
    """`root` is where `proc` and `sys` are."""
    info = _cpuinfo(root)
    yield Finding("processor", processor(info))
    sets = instruction_sets(info)
    yield Finding.of("instruction sets", ", ".join(sets) or "none that kernels are written for", *_lacking(info, sets))
    yield _cores(root)
    governor = read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor:
        slow = governor == "powersave" and "it holds the clock down: set it to performance"
        yield Finding.of("governor", governor, slow or "")
    pages = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    if pages:
        chosen = pages.partition("[")[2].partition("]")[0]
        never = chosen == "never" and "weights are read through small pages: set it to madvise or always"
        yield Finding.of("huge pages", chosen, never or "")
    yield _memory(settings, root)
    yield _files()


def _lacking(info: dict[str, str], sets: list[str]) -> Iterator[str]:
    if "flags" not in info:
        return
    if "avx512f" not in sets:
        yield "without avx512f kernels work on 8 numbers at a time in place of 16"
    if not {"avx512_bf16", "amx_bf16"}.intersection(sets):
        yield "without avx512_bf16 or amx_bf16 products are of float32"


def _cores(root: Path) -> Finding:
    cores = len(os.sched_getaffinity(0))
    quota, _, period = read_text(root / "sys/fs/cgroup/cpu.max").partition(" ")
    granted = int(quota) / int(period) if quota.isdigit() and period.isdigit() else None
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return Finding.of(
        "cores",
        str(cores) if granted is None else f"{cores}, of which the control group grants {granted:g}",
        f"threads on {cores} cores wait for a share of {granted:g}: set OMP_NUM_THREADS to that, or raise the limit"
        if granted is not None and granted < cores and not threads
        else "",
        f"OMP_NUM_THREADS is {threads}, so that steps use no more"
        if threads.isdigit() and int(threads) < cores
        else "",
    )


def _memory(settings: Settings, root: Path) -> Finding:
    allowed = allowed_bytes(root)
    wanted = (settings.kv_cache_bytes or _DEFAULT_KV_BYTES) + settings.adapter_memory_bytes
    is_short = bool(allowed) and settings.device != "cuda" and wanted > allowed
    return Finding.of(
        "memory",
        human_bytes(allowed) + (", as the control group limits it" if allowed < total_bytes(root) else ""),
        f"the KV cache and adapters may take {human_bytes(wanted)} beside the base: lower --adapter-memory-bytes or "
        "--kv-cache-bytes"
        if is_short
        else "",
    )


def _files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_few = hard != resource.RLIM_INFINITY and hard < MIN_FILES
    found = "without limit" if hard == resource.RLIM_INFINITY else f"{hard} at most"
    return Finding.of("open files", found, "a connection is one: raise the limit (ulimit -n)" if is_few else "")


def _cpuinfo(root: Path) -> dict[str, str]:
    """What Linux says of the first processor."""
    first, _, _ = read_text(root / "proc/cpuinfo").partition("\n\n")
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
