"""`make bench`: throughput of a server of one's own, over HTTP from a second process, base against adapters.

Sixteen random adapters of rank 16 on every linear, 128 prompt tokens, 64 generated, greedy, 16 in flight and one.
Before anything is timed, each adapter's greedy tokens in a mixed batch must equal those it gives alone.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from swaplora_server.config import Settings
from swaplora_server.embedded import ensure_embedded_base
from test_restart import process

PROMPT_TOKENS, OUTPUT_TOKENS, NUM_ADAPTERS, RANK = 128, 64, 16, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
console = Console()


@dataclass(frozen=True)
class Run:
    """One measured workload."""

    label: str
    tokens_per_second: float
    ttft_p50: float  # seconds
    tpot_p50: float  # seconds


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    ttft: float
    tpot: float


def make_adapters(base: Path, folder: Path, count: int) -> None:
    """Random adapters with non-zero B, in bfloat16 as trainers save them."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), config)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    scale = 0.1 / RANK**0.5 if "lora_B" in name else parameter.shape[1] ** -0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.save_pretrained(folder / f"a{number}")


def prompt(number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]


async def complete(client: httpx.AsyncClient, model: str, number: int, num_tokens: int = OUTPUT_TOKENS) -> Answer:
    body = {
        "model": model,
        "prompt": prompt(number),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    began, stamps, ids = time.perf_counter(), [], []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                stamps.append(time.perf_counter())
                ids += httpx.Response(200, content=line[6:]).json()["choices"][0]["token_ids"]
    return Answer(ids, stamps[0] - began, (stamps[-1] - stamps[0]) / max(1, len(ids) - 1))


async def drive(url: str, label: str, models: Sequence[str], num_requests: int, concurrency: int) -> Run:
    """Keep `concurrency` requests in flight until `num_requests` have been answered."""
    gate = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(number: int) -> Answer:
            async with gate:
                return await complete(client, models[number % len(models)], number)

        began = time.perf_counter()
        answers = await asyncio.gather(*(one(number) for number in range(num_requests)))
        seconds = time.perf_counter() - began
    return Run(
        label,
        sum(len(answer.token_ids) for answer in answers) / seconds,
        median(answer.ttft for answer in answers),
        median(answer.tpot for answer in answers),
    )


async def check(url: str, names: Sequence[str]) -> None:
    """Each adapter's tokens in a mixed batch equal those it gives alone, and are not the base's."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        mixed = await asyncio.gather(*(complete(client, name, 0) for name in names))
        alone = [await complete(client, name, 0) for name in names]
        base = await complete(client, "base", 0)
    if [answer.token_ids for answer in mixed] != [answer.token_ids for answer in alone]:
        raise SystemExit("answers in a mixed batch differ from those given alone: not measured")
    if any(answer.token_ids == base.token_ids for answer in alone):
        raise SystemExit("an adapter gave the base's answer: not measured")


def machine() -> str:
    """This machine's read bandwidth and matrix rate, measured now."""
    data, a, b = torch.ones(1 << 27), torch.ones(512, 1024), torch.ones(1024, 1024)
    data.sum(), a @ b
    began = time.perf_counter()
    data.sum()
    bandwidth = data.nbytes / (time.perf_counter() - began) / 1e9
    began = time.perf_counter()
    for _ in range(10):
        a @ b
    rate = 10 * 2 * 512 * 1024 * 1024 / (time.perf_counter() - began) / 1e9
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"{threads} cores, {capability}, {bandwidth:.0f} GB/s, {rate:.0f} GFLOP/s in fp32, torch {torch.__version__}"


def measure(url: str, names: Sequence[str], rounds: int, num_requests: int) -> list[Run]:
    asyncio.run(check(url, names))
    plan: list[tuple[str, Sequence[str], int, int]] = [
        ("base, 16 in flight", ["base"], num_requests, 16),
        ("one adapter, 16 in flight", names[:1], num_requests, 16),
        ("16 adapters, 16 in flight", names, num_requests, 16),
        ("base, alone", ["base"], 6, 1),
        ("one adapter, alone", names[:1], 6, 1),
    ]
    runs = []
    for label, models, count, concurrency in plan:
        rounds_of_one = [asyncio.run(drive(url, label, models, count, concurrency)) for _ in range(rounds)]
        runs.append(sorted(rounds_of_one, key=lambda run: run.tokens_per_second)[rounds // 2])
        console.print(f"  {label}: {runs[-1].tokens_per_second:.1f} tok/s")
    return runs


def show(runs: Sequence[Run]) -> None:
    table = Table("workload", "output tok/s", "of base", "TTFT p50", "TPOT p50", title=machine())
    for run in runs:
        base = runs[0] if "16 in flight" in run.label else runs[3]
        table.add_row(
            run.label,
            f"{run.tokens_per_second:.1f}",
            f"{run.tokens_per_second / base.tokens_per_second:.2f}",
            f"{run.ttft_p50 * 1e3:.0f} ms",
            f"{run.tpot_p50 * 1e3:.1f} ms",
        )
    console.print(table)


def resident_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each workload; the median counts")
    parser.add_argument("--requests", type=int, default=64, help="requests of each workload with 16 in flight")
    parser.add_argument("--dtype", default="auto", help="as of swaplora serve")
    arguments = parser.parse_args()
    base = ensure_embedded_base(Settings().cache_dir, console.print)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        adapters = folder / "adapters"
        make_adapters(base, adapters, NUM_ADAPTERS)
        flags = ["--served-model-name", "base", "--adapter-dir", str(adapters), "--dtype", arguments.dtype]
        with process(base, folder / "data", *flags, "--kv-cache-bytes", "1GiB") as (server, client):
            runs = measure(
                str(client.base_url),
                [f"a{number}" for number in range(NUM_ADAPTERS)],
                arguments.rounds,
                arguments.requests,
            )
            console.print(f"server's memory with {NUM_ADAPTERS} adapters resident: {resident_mib(server.pid)} MiB")
        show(runs)


if __name__ == "__main__":
    main()
