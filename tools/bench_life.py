"""`make bench-life`: what loads, uploads, vectors of long inputs and a working set beyond the memory cost, over HTTP.

Random adapters of rank 16 on every linear of the embedded base. Answers are compared with those given undisturbed.
Gaps of streams say whose they are: beside them stands how long the server's busiest thread was ready to run, and had no
core (Linux). Where that is most of a gap, other programs have the machine.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

import httpx

from bench import RANK, complete, console, drive, machine, make_adapters, prompt, resident_mib
from server_process import process
from swaplora_server.bench.report import quantiles
from swaplora_server.config import Settings
from swaplora_server.embedded import ensure_embedded_base

NUM_ADAPTERS, NUM_RESIDENT, NUM_STREAMS, STREAM_TOKENS = 32, 8, 8, 150
ADAPTER_BYTES = 2 * 30 * RANK * 10_176  # of one in memory: bfloat16, 30 layers, in + out features of the seven linears
NUM_INPUTS, INPUT_TOKENS = 100, 512  # of one request for vectors
SETTLING = 8  # first tokens of a stream, among which the other streams' prompts are computed

Disturb = Callable[[httpx.AsyncClient], Awaitable[None]]


async def cold_and_warm(url: str, names: Sequence[str]) -> tuple[list[float], list[float]]:
    """Seconds to the first token of each adapter's first request, and of its second, which has another prompt."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await complete(client, "base", 0)
        cold, warm = [], []
        for name in names:
            cold.append((await complete(client, name, 1, 2)).ttft)
            warm.append((await complete(client, name, 2, 2)).ttft)
    return cold, warm


async def stream(
    client: httpx.AsyncClient, number: int, num_tokens: int = STREAM_TOKENS, settling: int = SETTLING
) -> tuple[list[int], list[float]]:
    """An answer of the base: its tokens, and the seconds between them, after those of the first `settling`."""
    body = {"model": "base", "prompt": prompt(number), "max_tokens": num_tokens, "temperature": 0, "stream": True}
    stamps, ids = [], []
    async with client.stream(
        "POST", "/v1/completions", json=body | {"ignore_eos": True, "return_token_ids": True}
    ) as r:
        async for line in r.aiter_lines():
            if line.startswith("data: {"):
                stamps.append(time.perf_counter())
                ids += json.loads(line[6:])["choices"][0]["token_ids"]
    return ids, [after - before for before, after in zip(stamps[settling:], stamps[settling + 1 :], strict=False)]


async def gaps(
    url: str, disturb: Callable[[httpx.AsyncClient], Awaitable[None]]
) -> tuple[list[list[int]], list[float]]:
    """Tokens and gaps of streams that run together while `disturb` is repeated."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        running = [asyncio.create_task(stream(client, number)) for number in range(NUM_STREAMS)]
        await asyncio.sleep(2)
        while not any(task.done() for task in running):
            await disturb(client)
        answers = await asyncio.gather(*running)
    return [ids for ids, _ in answers], sorted(gap for _, found in answers for gap in found)


def disturbances(names: Sequence[str], folder: Path) -> dict[str, Disturb]:
    """What happens beside the streams."""
    turn = iter(range(1_000_000))

    async def nothing(_client: httpx.AsyncClient) -> None:
        await asyncio.sleep(0.05)

    async def load(client: httpx.AsyncClient) -> None:
        (await client.post(f"/v1/adapters/{names[next(turn) % len(names)]}/warm")).raise_for_status()

    async def upload(client: httpx.AsyncClient) -> None:
        number = next(turn)
        files = {
            "config": (folder / f"a{number % 2}" / "adapter_config.json").read_bytes(),
            "weights": (folder / f"a{number % 2}" / "adapter_model.safetensors").read_bytes(),
        }
        (await client.put("/v1/adapters/replaced", files=files)).raise_for_status()

    async def embed(client: httpx.AsyncClient) -> None:
        rng = random.Random(next(turn))
        inputs = [[rng.randrange(1_000, 40_000) for _ in range(INPUT_TOKENS)] for _ in range(NUM_INPUTS)]
        (await client.post("/v1/embeddings", json={"model": "base", "input": inputs})).raise_for_status()

    vectors = f"vectors of {NUM_INPUTS} inputs of {INPUT_TOKENS} tokens"
    return {"nothing": nothing, "loads": load, "uploads": upload, vectors: embed}


def waited(pid: int) -> dict[str, float]:
    """Seconds that each thread of a process was ready to run and had no core, since it began."""
    found: dict[str, float] = {}
    for one in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # of a thread that has ended since
            found[str(one)] = int(one.read_text().split()[1]) / 1e9
    return found


def show_times(url: str, names: Sequence[str]) -> None:
    cold, warm = asyncio.run(cold_and_warm(url, names))
    console.print(
        f"time to first token: cold {median(cold) * 1e3:.0f} ms, warm {median(warm) * 1e3:.0f} ms, "
        f"difference {(median(cold) - median(warm)) * 1e3:.0f} ms (medians of {len(names)} adapters)"
    )


def show_gaps(url: str, pid: int, beside: Mapping[str, Disturb]) -> None:
    """The first of `beside` is no disturbance."""
    control: list[list[int]] = []
    undisturbed = 0.0  # milliseconds, 99th percentile
    for label, disturb in beside.items():
        before, began = waited(pid), time.perf_counter()
        answers, found = asyncio.run(gaps(url, disturb))
        seconds = time.perf_counter() - began
        longest_wait = max(of - before.get(thread, 0.0) for thread, of in waited(pid).items())
        control = control or answers
        if answers != control:
            raise SystemExit(f"streams beside {label} differ from undisturbed ones: not measured")
        gap_ms = quantiles(found) or {}
        undisturbed = undisturbed or gap_ms["p99"]
        console.print(
            f"{NUM_STREAMS} streams beside {label}: gap between tokens p50 {gap_ms['p50']:.0f} ms, "
            f"p99 {gap_ms['p99']:.0f} ms ({gap_ms['p99'] / undisturbed:.2f} of undisturbed), "
            f"longest {gap_ms['max']:.0f} ms; of {seconds:.0f} s a thread had no core for {longest_wait:.1f}"
        )


def measure(base: Path, scratch: Path, num_resident: int, num_requests: int) -> float:
    """Output tokens per second with memory for `num_resident` of the adapters; where it is short, what that costs."""
    names = [f"a{number}" for number in range(NUM_ADAPTERS)]
    flags = ["--served-model-name", "base", "--adapter-dir", str(scratch / "adapters")]
    budget = str(num_resident * ADAPTER_BYTES + (1 << 20))
    with process(base, scratch / "data", *flags, "--adapter-memory-bytes", budget) as (server, client):
        url = str(client.base_url)
        if num_resident < NUM_ADAPTERS:
            show_times(url, names)
            show_gaps(url, server.pid, disturbances(names, scratch / "adapters"))
        else:
            asyncio.run(cold_and_warm(url, names))
        label = f"{NUM_ADAPTERS} adapters in traffic, memory for {num_resident}"
        run = asyncio.run(drive(url, label, names, num_requests, 16))
        console.print(f"{label}: {run.tokens_per_second:.1f} tok/s, {resident_mib(server.pid)} MiB")
    return run.tokens_per_second


def beside_vectors(base: Path, scratch: Path) -> None:
    """The streams undisturbed, and beside requests for vectors, on a server without adapters."""
    with process(base, scratch / "data", "--served-model-name", "base") as (server, client):
        beside = disturbances((), scratch)
        kept = {label: disturb for label, disturb in beside.items() if label == "nothing" or "vectors" in label}
        show_gaps(str(client.base_url), server.pid, kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", action="store_true", help="gaps beside vectors of long inputs alone, two minutes")
    parser.add_argument("--requests", type=int, default=96, help="requests of each throughput run, 16 in flight")
    arguments = parser.parse_args()
    base = ensure_embedded_base(Settings().cache_dir, console.print)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if arguments.vectors:
            return beside_vectors(base, scratch)
        make_adapters(base, scratch / "adapters", NUM_ADAPTERS)
        within, beyond = (measure(base, scratch, count, arguments.requests) for count in (NUM_ADAPTERS, NUM_RESIDENT))
    console.print(f"beyond the memory / within it: {beyond / within:.2f} ({machine()})")


if __name__ == "__main__":
    main()
