"""What bringing an adapter onto the card costs, by itself and while steps run, and what the memory is taken by."""

import threading
import time
from collections import deque
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from gpu_checks.card import Card
from gpu_checks.models import Stepper, prompt, save_random_adapter
from gpu_checks.report import Report
from gpu_checks.steps import stepper_for
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base.base_model import BaseModel


def measure_loads(report: Report, card: Card, name: str, base: BaseModel, scratch: Path) -> dict[str, Any]:
    """Files to the host's memory to the card, again and again: with nothing running, then beside 16 decoding rows."""
    folder = save_random_adapter(base, scratch / f"{name}-adapter", 0)
    count = 2 if card.is_dry else 5
    on_host, idle = _load_times(base, folder, count)
    stepper = stepper_for(base, 16, 2048 if card.is_gpu else 64)
    for row in range(16):
        stepper.add(prompt(row, 16, base.vocab_size))
    stepper.decode()
    quiet = stepper.times(4 if card.is_dry else 20)
    steps, busy = _together(stepper, lambda: _load_times(base, folder, count)[1], 4 if card.is_dry else 20)
    nbytes = (folder / WEIGHTS_FILE).stat().st_size
    report.row(f"{name} adapter from files to the host's memory", f"{median(on_host) * 1e3:.1f} ms")
    report.row(f"{name} adapter from there to the card, idle", f"{median(idle) * 1e3:.1f} ms of {nbytes / 1e6:.1f} MB")
    report.row(f"{name} adapter from there to the card, beside 16 rows", f"{median(busy) * 1e3:.1f} ms")
    report.row(f"{name} step of 16 rows, quiet", f"{median(quiet) * 1e3:.1f} ms, longest {max(quiet) * 1e3:.1f} ms")
    report.row(
        f"{name} step of 16 rows, beside loads", f"{median(steps) * 1e3:.1f} ms, longest {max(steps) * 1e3:.1f} ms"
    )
    return {
        "bytes": nbytes,
        "idle": idle,
        "host": on_host,
        "busy": busy,
        "quiet_steps": quiet,
        "steps_beside_loads": steps,
    }


def _read(base: BaseModel, folder: Path) -> AdapterWeights:
    host = torch.device("cpu")
    files = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    return load_weights("sha256:0", *files, base.layers, base.dtype, host, base.backend.placement)


def _load_times(base: BaseModel, folder: Path, count: int) -> tuple[list[float], list[float]]:
    """Seconds from the files to the host's memory, and from there to what steps read."""
    reads, copies = [], []
    for _ in range(count):
        began = time.perf_counter()
        on_host = _read(base, folder)
        read = time.perf_counter()
        base.prepared(on_host)
        reads.append(read - began)
        copies.append(time.perf_counter() - read)
    return reads, copies


def _together(stepper: Stepper, load: Any, least: int) -> tuple[list[float], list[float]]:
    """Seconds of steps while another thread loads, and of its loads."""
    loads: list[float] = []
    thread = threading.Thread(target=lambda: loads.extend(load()))
    thread.start()
    steps: list[float] = []
    while thread.is_alive() or len(steps) < least:
        steps += stepper.times(1)
    thread.join()
    return steps, loads


def swap_adapters(report: Report, card: Card, name: str, base: BaseModel, scratch: Path) -> dict[str, Any]:
    """Adapters brought from the host's memory to the card in the place of others, beside 16 decoding rows."""
    count = 4 if card.is_dry else 200
    on_host = [_read(base, save_random_adapter(base, scratch / f"{name}-swapped-{n}", n)) for n in range(4)]
    stepper = stepper_for(base, 16, 4096 if card.is_gpu else 64)
    for row in range(16):
        stepper.add(prompt(row, 16, base.vocab_size))
    stepper.decode()
    stepper.record(16)
    stepper.times(2)

    def swap() -> list[float]:
        resident: deque[AdapterWeights] = deque(maxlen=8)
        times = []
        for number in range(count):
            began = time.perf_counter()
            resident.append(base.prepared(on_host[number % len(on_host)]))
            times.append(time.perf_counter() - began)
        return times

    beside, swaps = _together(stepper, swap, 8)
    quiet = stepper.times(min(len(beside), 1000))
    of_quiet, of_beside = (quantiles(steps, n=100, method="inclusive")[98] for steps in (quiet, beside))
    report.row(f"{name} adapter swapped on the card, {count} times", f"{median(swaps) * 1e3:.1f} ms")
    report.row(
        f"{name} step of 16 rows, p99, beside {count} swaps",
        f"{of_beside * 1e3:.2f} ms, {of_beside / of_quiet:.2f} of {of_quiet * 1e3:.2f} ms quiet",
    )
    return {"swaps": swaps, "beside": beside, "quiet": quiet}


def count_copies(report: Report, card: Card, base: BaseModel, scratch: Path) -> dict[str, Any]:
    """Copies to the card that one adapter takes."""
    if not card.is_gpu:
        return {}
    folder = save_random_adapter(base, scratch / "counted", 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        base.prepared(_read(base, folder))
    events = found.key_averages()
    counts = {event.key: event.count for event in events if "emcpy" in event.key or "Synchronize" in event.key}
    report.finding(f"one adapter on {len(base.layers.linears)} linears is brought to the card in {counts}")
    return counts


def show_memory(report: Report, card: Card, name: str, base: BaseModel) -> dict[str, Any]:
    """What the base has taken, and what is free beside it."""
    figures: dict[str, Any] = {"weights": base.weight_bytes, "kv_bytes_per_token": base.kv_bytes_per_token}
    if card.is_gpu:
        figures["allocated"] = torch.cuda.memory_allocated()
        figures["kept by torch"] = torch.cuda.memory_reserved()
        card.free()
        figures["kept by torch, after giving back"] = torch.cuda.memory_reserved()
        figures["free"], figures["total"] = torch.cuda.mem_get_info()
    report.row(
        f"{name} memory", ", ".join(f"{key} {value / 1e9:.2f} GB" for key, value in figures.items() if value > 1e7)
    )
    return figures
