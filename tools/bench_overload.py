"""`make bench-overload`: what a server of one's own does when more is asked of it than it can do, over HTTP.

An open loop at the capacity and at three times it, and what is left when it ends. Then one who asks for little beside a
flood of fifty times the capacity, by another adapter and by another tenant, against the same one beside 63 requests
that are always at work, where a place is free. The load comes from this process; the server has its own.
"""

import argparse
import asyncio
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx

from bench import console, machine, resident_mib
from repository import ROOT
from server_process import process
from swaplora_server.bench.answer import Answer
from swaplora_server.bench.connection import Endpoint, ask
from swaplora_server.bench.load import closed_loop, open_loop
from swaplora_server.bench.options import FIRST_TOKEN_ID
from swaplora_server.bench.workload import PromptRequest, arrival_times
from swaplora_server.config import Settings
from swaplora_server.embedded import ensure_embedded_base

PROMPT_TOKENS, OUTPUT_TOKENS, VOCAB_SIZE, NUM_PLACES = 64, 32, 40_000, 64
SURGE, FLOOD, LONG = 3, 50, 10  # times the capacity
LONG_SECONDS = 300.0
LITTLE = 0.1  # of the capacity: what one asks for beside the others, whose share would be half
TENANTS = ("acme", "beta")
ADAPTERS = ("sql", "json", "intent")
PARTS = ("surge", "share", "adapter", "tenant")


@dataclass(frozen=True)
class Server:
    """A running server, and who may ask it."""

    pid: int
    acme: Endpoint
    beta: Endpoint


@dataclass(frozen=True)
class Flow:
    """Requests of one tenant to some models, open loop."""

    endpoint: Endpoint
    models: Sequence[str]
    rate: float
    seconds: float
    seed: str

    async def run(self) -> list[Answer]:
        count = max(1, round(self.rate * self.seconds))
        due = arrival_times(count, self.rate, 1.0, Random(f"{self.seed} arrivals"))
        return await open_loop(self.endpoint, requests(self.models, count, self.seed), due)


@contextmanager
def running(base: Path, flags: Sequence[str]) -> Iterator[Server]:
    """A server with two tenants, each of which has the demo adapters."""
    with tempfile.TemporaryDirectory() as folder:
        keys = {tenant: f"sk-{tenant}" for tenant in TENANTS}
        key_file = Path(folder) / "keys.json"
        stored = [
            {"id": tenant, "tenant": tenant, "scopes": ["generate", "adapters:read", "adapters:write"]}
            | {"sha256": hashlib.sha256(key.encode()).hexdigest()}
            for tenant, key in keys.items()
        ]
        key_file.write_text(json.dumps({"keys": stored}))
        key_file.chmod(0o600)
        own = ["--served-model-name", "base", "--key-file", str(key_file), "--kv-cache-bytes", "1GiB"]
        with process(base, Path(folder) / "data", *own, *flags) as (server, client):
            for key in keys.values():
                upload(client, key)
            acme, beta = (Endpoint.of(str(client.base_url), key) for key in keys.values())
            yield Server(server.pid, acme, beta)


def upload(client: httpx.Client, key: str) -> None:
    for name in ADAPTERS:
        config, weights = (ROOT / "demo" / name / f"adapter_{part}" for part in ("config.json", "model.safetensors"))
        files = {"config": config.read_bytes(), "weights": weights.read_bytes()}
        headers = {"Authorization": f"Bearer {key}"}
        client.put(f"/v1/adapters/{name}", files=files, headers=headers).raise_for_status()


def requests(models: Sequence[str], count: int, seed: str) -> list[PromptRequest]:
    """Random prompts, of which no two runs have one in common, answered by each of `models` in turn."""
    rng, ids = Random(seed), range(FIRST_TOKEN_ID, VOCAB_SIZE)
    fixed: dict[str, Any] = {
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    fixed |= {"stream": True, "stream_options": {"include_usage": True}}
    bodies = (
        {"model": models[number % len(models)], "prompt": rng.choices(ids, k=PROMPT_TOKENS)} | fixed
        for number in range(count)
    )
    return [PromptRequest(None, OUTPUT_TOKENS, json.dumps(body).encode()) for body in bodies]


async def keep_at_work(endpoint: Endpoint, models: Sequence[str], concurrency: int, until: asyncio.Event) -> None:
    """So many requests in flight, until it is set."""
    pool = iter(requests(models, 100_000 // PROMPT_TOKENS, "at work"))

    async def work() -> None:
        while not until.is_set():
            await ask(endpoint, Answer(next(pool), time.perf_counter()))

    async with asyncio.TaskGroup() as workers:
        for _ in range(concurrency):
            workers.create_task(work())


def times(seconds: Sequence[float]) -> str:
    """p50 and p99."""
    if not seconds:
        return "none"
    found = sorted(seconds)
    return ", ".join(f"p{q} {found[min(len(found) - 1, len(found) * q // 100)] * 1e3:.0f} ms" for q in (50, 99))


def served(answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.failure is None]


def is_refusal(answer: Answer) -> bool:
    return (answer.failure or "").startswith("HTTP 429")


def show_open(label: str, answers: Sequence[Answer], seconds: float) -> float:
    """What became of an open loop; whole answers a second while it was on."""
    good, refused = served(answers), [answer for answer in answers if is_refusal(answer)]
    end = answers[0].began + seconds
    goodput = sum(answer.ended <= end for answer in good) / seconds
    console.print(
        f"{label}: {len(answers)} asked, {len(good)} served, {len(refused)} refused, "
        f"{len(answers) - len(good) - len(refused)} failed; goodput {goodput:.2f}/s; "
        f"first token {times([answer.ttft for answer in good])}; per token {times([a.tpot or 0 for a in good])}; "
        f"refusals {times([answer.latency for answer in refused])}; "
        f"last answered {max(answer.ended for answer in answers) - end:.1f} s after the end"
    )
    return goodput


async def measure_capacity(server: Server) -> float:
    """Requests a second with as many in flight as there are places."""
    began = time.perf_counter()
    asked = requests(("base", *ADAPTERS), 3 * NUM_PLACES, "capacity")
    answers = await closed_loop(server.acme, asked, NUM_PLACES)
    if len(served(answers)) < len(answers):
        raise SystemExit(f"not every request was answered: {next(a.failure for a in answers if a.failure)}")
    return len(answers) / (time.perf_counter() - began)


async def surge(server: Server, capacity: float, seconds: float, factor: int) -> None:
    models = ("base", *ADAPTERS)
    once = await Flow(server.acme, models, capacity, seconds, "once").run()
    before = show_open("at the capacity", once, seconds)
    flood = await Flow(server.acme, models, factor * capacity, seconds, "surge").run()
    after = show_open(f"at {factor} times it", flood, seconds)
    console.print(f"goodput at {factor} times the capacity, to that at it: {after / before:.2f}")


async def share(server: Server, capacity: float, seconds: float) -> None:
    """One who asks for little, beside 63 requests that are always at work: what is nobody's fault."""
    until = asyncio.Event()
    busy = asyncio.create_task(keep_at_work(server.acme, ("sql",), NUM_PLACES - 1, until))
    await asyncio.sleep(3)
    answers = await Flow(server.acme, ("json",), LITTLE * capacity, seconds, "share").run()
    until.set()
    await busy
    show_open(f"one beside {NUM_PLACES - 1} at work", answers, seconds)


async def beside_flood(server: Server, capacity: float, seconds: float, of: str) -> None:
    flood = Flow(server.acme, ("sql",), FLOOD * capacity, seconds + 3, f"flood of one {of}")
    pending = asyncio.create_task(flood.run())
    await asyncio.sleep(3)
    victim = (server.acme, ("json",)) if of == "adapter" else (server.beta, ("sql",))
    answers = await Flow(*victim, LITTLE * capacity, seconds, f"one beside a flood of one {of}").run()
    show_open(f"one beside a flood of one {of}", answers, seconds)
    show_open(f"that flood of {FLOOD} times the capacity", await pending, seconds + 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="some parts of it")
    parser.add_argument("--seconds", type=float, default=30.0, help="that each load goes on")
    parser.add_argument("--capacity", type=float, help="requests a second (default: measured)")
    parser.add_argument("--long", action="store_true", help=f"{LONG} times the capacity for five minutes, alone")
    parser.add_argument("server_flags", nargs="*", help="after --: flags of swaplora serve")
    arguments = parser.parse_args()
    base = ensure_embedded_base(Settings().cache_dir, console.print)
    with running(base, arguments.server_flags) as server:
        asyncio.run(measure(server, arguments))
    console.print(machine())


async def measure(server: Server, arguments: argparse.Namespace) -> None:
    warm = requests(("base", *ADAPTERS), NUM_PLACES, "warm")
    for endpoint in (server.acme, server.beta):
        await closed_loop(endpoint, warm, NUM_PLACES)
    capacity = arguments.capacity or await measure_capacity(server)
    console.print(f"capacity: {capacity:.1f} requests/s with {NUM_PLACES} in flight; {resident_mib(server.pid)} MiB")
    if arguments.long:
        show_open(
            f"{LONG} times the capacity",
            await Flow(server.acme, ("base", *ADAPTERS), LONG * capacity, LONG_SECONDS, "long").run(),
            LONG_SECONDS,
        )
    else:
        for part in arguments.only or PARTS:
            match part:
                case "surge":
                    await surge(server, capacity, arguments.seconds, SURGE)
                case "share":
                    await share(server, capacity, arguments.seconds)
                case of:
                    await beside_flood(server, capacity, arguments.seconds, of)
    console.print(f"{resident_mib(server.pid)} MiB")


if __name__ == "__main__":
    main()
