"""What the card is, and the speeds that floors are reckoned from."""

import gc
import importlib.metadata
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gpu_checks.report import Report
from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.pick import pick_backend, torch_backend

CACHE = Path(tempfile.gettempdir()) / "swaplora-gpu-check"  # what is compiled for the card
PACKAGES = ("torch", "triton", "transformers", "peft", "tokenizers", "fastapi", "uvicorn", "pydantic")


@dataclass(frozen=True)
class Card:
    """Where the checks run. `copy` counts bytes read and written, as floors count the bytes that a step moves."""

    device: torch.device
    is_dry: bool  # on a CPU, with everything small: the figures mean nothing then
    copy: float  # bytes a second
    matmul: float  # bf16 operations a second

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def backend(self, dtype: torch.dtype) -> Backend:
        """What a server picks on this card; torch's operations on a CPU, whose own have tests of their own."""
        if self.is_gpu:
            return pick_backend(self.device, dtype, CACHE, lambda _message: None)
        return torch_backend(self.device)

    def wait(self) -> None:
        """Return when all that was launched is done."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int, warmups: int = 2) -> float:
        """The median time of one `run`, waited for."""
        for _ in range(warmups):
            run()
        times = []
        for _ in range(repeats):
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - began)
        return median(times)

    def free(self) -> None:
        gc.collect()  # layers lead to one another
        if self.is_gpu:
            torch.cuda.empty_cache()


def versions(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "device": device.type}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return found


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def measure(device: torch.device, *, is_dry: bool) -> tuple[Card, dict[str, Any]]:
    """The card, its versions and speeds: copies on it and to it, bf16 products, and launches."""
    card = Card(device, is_dry, 0.0, 0.0)
    copy = _copy_speed(card, 1 << 20 if is_dry else 1 << 32)
    card.free()  # or the first product's workspace comes to lie there, and keeps all of it
    matmul = _matmul_speed(card, 128 if is_dry else 8192)
    launch = _launch_seconds(card, 200 if is_dry else 5000)
    speeds = {"copy_bytes_per_s": copy, "matmul_flops_per_s": matmul, "launch_seconds": launch}
    if card.is_gpu:
        speeds |= _host_speeds(card)
    card.free()
    return Card(device, is_dry, copy, matmul), versions(device) | speeds


def _copy_speed(card: Card, num_bytes: int) -> float:
    source = torch.randn(num_bytes // 4, device=card.device)
    target = torch.empty_like(source)
    return 2 * num_bytes / card.seconds(lambda: target.copy_(source), 10)


def _matmul_speed(card: Card, side: int) -> float:
    a, b = (torch.randn(side, side, device=card.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / card.seconds(lambda: torch.mm(a, b), 10)


def _launch_seconds(card: Card, count: int) -> float:
    few = torch.zeros(32, device=card.device)
    return card.seconds(lambda: [few.add_(1) for _ in range(count)], 3, 1) / count


def _host_speeds(card: Card) -> dict[str, float]:
    pageable = torch.empty(1 << 28, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    room = torch.empty_like(pageable, device=card.device)
    return {
        "pageable_bytes_per_s": pageable.nbytes / card.seconds(lambda: room.copy_(pageable), 3, 1),
        "pinned_bytes_per_s": pageable.nbytes / card.seconds(lambda: room.copy_(pinned, non_blocking=True), 5),
    }


def show(report: Report, measured: dict[str, Any]) -> None:
    report.row("copy on the card", f"{measured['copy_bytes_per_s'] / 1e12:.2f} TB/s")
    report.row("bf16 product", f"{measured['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s")
    report.row("one small launch from Python", f"{measured['launch_seconds'] * 1e6:.1f} µs")
    for kind in ("pageable", "pinned"):
        if f"{kind}_bytes_per_s" in measured:
            report.row(f"{kind} memory to the card", f"{measured[f'{kind}_bytes_per_s'] / 1e9:.1f} GB/s")
