"""`swaplora serve` as a user starts it, on the card, under the load of `swaplora bench`."""

import asyncio
import time
from pathlib import Path
from typing import Any

import torch

import bench
import tiny
from gpu_checks.card import Card
from gpu_checks.models import random_base, random_model, save_random_adapter
from gpu_checks.report import Report
from server_process import process

ROUNDS = ((1, 2, True), (16, 32, False), (16, 16, True), (64, 64, False))  # in flight, requests, of adapters


def measure_http(report: Report, card: Card, shape: str, scratch: Path) -> dict[str, Any]:
    """Tokens a second of the base, and of sixteen adapters in turn."""
    folder, adapters = scratch / f"http-{shape}", scratch / f"http-{shape}-adapters"
    random_model(shape, card, torch.bfloat16).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    base = random_base(shape, card, torch.bfloat16)
    for name in bench.NAMES[: 2 if card.is_dry else None]:
        save_random_adapter(base, adapters / name, int(name[1:]))
    del base
    card.free()
    flags = ["--served-model-name", "base", "--adapter-dir", str(adapters), "--kv-cache-bytes", "4GiB"]
    flags = flags if card.is_gpu else [*flags[:-1], "64MiB", "--device", "cpu"]
    began = time.perf_counter()
    figures: dict[str, Any] = {}
    with process(folder, scratch / f"http-{shape}-data", *flags) as (_, client):
        figures["seconds to be ready"] = time.perf_counter() - began
        report.row(f"{shape}: seconds until a started server is ready", f"{figures['seconds to be ready']:.1f}")
        names = bench.NAMES[: 2 if card.is_dry else None]
        for in_flight, count, of_adapters in ((2, 4, True),) if card.is_dry else ROUNDS:
            label = f"{len(names)} adapters" if of_adapters else "base"
            run = asyncio.run(_drive(client, label, names if of_adapters else [], count, in_flight))
            figures[f"{label} c{in_flight}"] = run.report
            report.row(f"{shape} over HTTP, {label}, {in_flight} in flight", f"{run.tokens_per_second:.0f} tok/s")
    return figures


async def _drive(client: Any, label: str, asked: list[str], count: int, in_flight: int) -> bench.Run:
    vocab = ["--vocab-size", "250"]
    return await bench.drive(str(client.base_url), label, asked, count, in_flight, *vocab)
