"""`make bench-overload`: what a server of one's own does when more is asked of it than it can do, over HTTP.

An open loop at the capacity and at three times it, and what is left when it ends. Then one who asks for a fifth of the
capacity, a hundred times: alone, beside an equal who keeps all places busy, which is what its share gives, and beside a
flood of fifty times the capacity, by another adapter of its tenant and by another tenant. Who is beside it asks from a
process of its own, at low priority. All who ask have the last core to themselves, in every measurement, and the server
the others: what it costs to send a flood is not the server's.
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
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
SECONDS, LONG_SECONDS = 30.0, 300.0
LITTLE, NUM_ASKED = 0.2, 100  # of the capacity, and requests: what one asks for beside the others; half is its share
SECONDS_BEFORE = 3.0  # that the others have begun before it
NICENESS = 10  # of the others, who share a core with it: they are not to be what holds it up
TENANTS = ("acme", "beta")
ADAPTERS = ("sql", "json", "intent")
PARTS = ("surge", "adapter", "tenant")


@dataclass(frozen=True)
class Server:
    """A running server, and who may ask it."""

    pid: int
    acme: Endpoint
    beta: Endpoint


@dataclass(frozen=True)
class Flow:
    """Requests of one tenant to some models, open loop. Those with the same `arrivals` come at the same times."""

    endpoint: Endpoint
    models: Sequence[str]
    rate: float
    seconds: float
    seed: str
    arrivals: str = ""

    async def run(self) -> list[Answer]:
        count = max(1, round(self.rate * self.seconds))
        due = arrival_times(count, self.rate, 1.0, Random(f"{self.arrivals or self.seed} arrivals"))
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


@dataclass(frozen=True)
class AtWork:
    """So many requests of one tenant in flight at all times, to some models."""

    endpoint: Endpoint
    models: Sequence[str]
    concurrency: int
    seconds: float

    async def run(self) -> list[Answer]:
        pool = iter(requests(self.models, round(self.seconds * 1000), "at work"))
        answers, end = [], time.perf_counter() + self.seconds

        async def work() -> None:
            while time.perf_counter() < end:
                answers.append(Answer(next(pool), time.perf_counter()))
                await ask(self.endpoint, answers[-1])

        async with asyncio.TaskGroup() as workers:
            for _ in range(self.concurrency):
                workers.create_task(work())
        return answers


def run_beside(load: Flow | AtWork) -> tuple[list[Answer], float]:
    """Its answers, and how much processor time it took to ask."""
    before = time.process_time()
    answers = asyncio.run(load.run())
    return answers, time.process_time() - before


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


def to_first(answers: Sequence[Answer], percent: int) -> float:
    """A percentile of the time to the first token, in seconds; infinite where as many have none."""
    found = sorted(answer.ttft if answer.failure is None else math.inf for answer in answers)
    return found[min(len(found) - 1, len(found) * percent // 100)]


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
    seconds_before = min(seconds, SECONDS)
    once = await Flow(server.acme, models, capacity, seconds_before, "once").run()
    before = show_open("at the capacity", once, seconds_before)
    flood = await Flow(server.acme, models, factor * capacity, seconds, "surge").run()
    after = show_open(f"at {factor} times it", flood, seconds)
    console.print(f"goodput at {factor} times the capacity, to that at it: {after / before:.2f}")


async def isolation(server: Server, processes: Executor, capacity: float, of: str) -> None:
    """One who asks for little, alone and beside others, of another adapter or of another tenant."""
    victim = (server.acme, ("json",)) if of == "adapter" else (server.beta, ("sql",))
    rate = LITTLE * capacity
    seconds = NUM_ASKED / rate
    all_seconds = SECONDS_BEFORE + seconds
    beside: dict[str, Flow | AtWork | None] = {
        "alone": None,
        f"beside another {of} with {NUM_PLACES} at work": AtWork(server.acme, ("sql",), NUM_PLACES, all_seconds),
        f"beside a flood of another {of}": Flow(server.acme, ("sql",), FLOOD * capacity, all_seconds, f"flood {of}"),
    }
    found = [
        await one_beside(label, processes, load, Flow(*victim, rate, seconds, f"{of} {label}", of))
        for label, load in beside.items()
    ]
    for percent in (50, 90, 99):
        alone, share, flood = (to_first(answers, percent) for answers in found)
        console.print(
            f"{of}: p{percent} of the first token alone {alone * 1e3:.0f} ms, at its share {share * 1e3:.0f}, "
            f"beside a flood {flood * 1e3:.0f}: {flood / share:.2f} of that at its share"
        )


async def one_beside(label: str, processes: Executor, load: Flow | AtWork | None, victim: Flow) -> list[Answer]:
    if load is None:
        answers = await victim.run()
    else:
        pending = asyncio.get_running_loop().run_in_executor(processes, run_beside, load)
        await asyncio.sleep(SECONDS_BEFORE)
        answers = await victim.run()
        others, cpu_seconds = await pending
        show_open(f"  the others, in {cpu_seconds:.0f} s of processor time", others, load.seconds)
    show_open(f"one {label}", answers, victim.seconds)
    return answers


def two_parts() -> tuple[set[int], set[int]]:
    """The server's cores, and that of all who ask."""
    *server, last = sorted(os.sched_getaffinity(0))
    if not server:
        raise SystemExit("this needs two cores: one is for those who ask")
    return set(server), {last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="some parts of it")
    parser.add_argument(
        "--seconds", type=float, help=f"that a surge goes on (default {SECONDS:.0f}, long {LONG_SECONDS:.0f})"
    )
    parser.add_argument("--capacity", type=float, help="requests a second (default: measured)")
    parser.add_argument("--long", action="store_true", help=f"{LONG} times the capacity, alone")
    parser.add_argument("server_flags", nargs="*", help="after --: flags of swaplora serve")
    arguments = parser.parse_args()
    base = ensure_embedded_base(Settings().cache_dir, console.print)
    of_server, of_others = two_parts()
    os.sched_setaffinity(0, of_server)  # what is started from here has the same, and as many threads
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=os.nice, initargs=(NICENESS,))
    with pool as processes, running(base, arguments.server_flags) as server:
        os.sched_setaffinity(0, of_others)
        processes.submit(time.sleep, 0).result()  # it has imported all that it needs
        console.print(f"the server has {len(of_server)} of {len(of_server) + 1} cores, those who ask have the last")
        asyncio.run(measure(server, processes, arguments))
    console.print(machine())


async def measure(server: Server, processes: Executor, arguments: argparse.Namespace) -> None:
    warm = requests(("base", *ADAPTERS), NUM_PLACES, "warm")
    for endpoint in (server.acme, server.beta):
        await closed_loop(endpoint, warm, NUM_PLACES)
    capacity = arguments.capacity or await measure_capacity(server)
    console.print(f"capacity: {capacity:.1f} requests/s with {NUM_PLACES} in flight; {resident_mib(server.pid)} MiB")
    seconds = arguments.seconds or (LONG_SECONDS if arguments.long else SECONDS)
    if arguments.long:
        await surge(server, capacity, seconds, LONG)
    else:
        for part in arguments.only or PARTS:
            match part:
                case "surge":
                    await surge(server, capacity, seconds, SURGE)
                case of:
                    await isolation(server, processes, capacity, of)
    console.print(f"{resident_mib(server.pid)} MiB")


if __name__ == "__main__":
    main()
