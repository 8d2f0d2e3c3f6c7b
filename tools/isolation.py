"""`make isolation`: the proof that no request is ever answered with another's weights, on a real server.

The server has memory for three adapters. Two of them, and the base, decode long streams all the time; every other one
is swapped through the room that is left.

1. Control: each adapter and the base answers alone, twice. The two must agree, and no two adapters say the same.
2. Swaps: others are asked for, uploaded, replaced and deleted every 30 ms. Every token of the long streams, and every
   answer of the others, must be what the digest in its own header says alone.
3. Replaces: sixteen streams of one name that is replaced again and again. Each must be whole what its digest says.

`--fault NAME` plants a fault first, which must make the proof fail: see planted_faults.py.
"""

import argparse
import asyncio
import gc
import itertools
import random
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from structlog.testing import capture_logs

import tiny
from isolation_report import Report
from planted_faults import FAULTS
from serving import BASE, Running, Streamed, read_event, serving, settings
from soak import size
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_server.config import Settings

TOLERANCE = 1e-4  # of a log-probability, in float32
NUM_ADAPTERS, NUM_RESIDENT, RANK = 8, 3, 8
CONTEXT, SHORT, SHORTEST = 1024, 40, 6  # tokens
NUM_SWAPPERS, NUM_READERS = 3, 16
PACE_SECONDS = 0.03
BASE_SEED = 4  # of those that leave the controls without a tie
MAX_PROBLEMS = 20  # after which there is no need to go on


@dataclass(frozen=True)
class Adapter:
    """An adapter's two files, and the digest that the server gave it."""

    name: str
    files: dict[str, bytes]
    digest: str


@dataclass(frozen=True)
class Workload:
    """How much is done, and how long the long streams are, in tokens."""

    num_swaps: int
    num_replaces: int
    length: int = CONTEXT - 24


@dataclass
class Proof:
    """One run against one server. What each digest says alone is in `alone`; the base's stands under ""."""

    client: httpx.AsyncClient
    adapters: list[Adapter]
    report: Report
    workload: Workload
    alone: dict[str, Streamed] = field(default_factory=dict)
    is_replaced: bool = False

    def __post_init__(self) -> None:
        self.digests = {BASE: ""} | {adapter.name: adapter.digest for adapter in self.adapters}
        self.others = itertools.cycle(self.adapters[2:])  # the next one is never among the last few

    @property
    def long_models(self) -> list[str]:
        """Who is decoding all the time."""
        return [BASE, *(adapter.name for adapter in self.adapters[:2])]

    @property
    def is_swapped(self) -> bool:
        return self.report.swaps >= self.workload.num_swaps or self.is_lost

    @property
    def is_lost(self) -> bool:
        return len(self.report.problems) >= MAX_PROBLEMS

    async def run(self) -> None:
        """All three parts, each only while those before it found nothing."""
        await self.control()
        if not self.report.problems:
            streams = [self.stream_on(model) for model in 2 * self.long_models]
            await asyncio.gather(*streams, *(self.swap(number) for number in range(NUM_SWAPPERS)))
        if not self.report.problems:
            await self.put("turning", self.adapters[0])
            await asyncio.gather(self.replace(), *(self.read_replaced() for _ in range(NUM_READERS)))

    async def control(self) -> None:
        """Everyone alone, twice: as a whole answer with the likeliest two of each token, then as a stream."""
        long, others = self.workload.length, self.adapters[2:]
        lengths = dict.fromkeys(self.long_models, long) | {other.name: SHORT for other in others}
        for model, length in lengths.items():
            whole = await self.ask_whole(model, length)
            self.alone[self.digests[model]] = whole
            for said in (whole, await self.ask(model, length)):
                self.check(said, length, self.digests[model])
        if len({tuple(said.token_ids[:SHORTEST]) for said in self.alone.values()}) < len(lengths):
            self.report.problems.append("two adapters say the same, so that one could not be told from the other")

    async def stream_on(self, model: str) -> None:
        """One long stream after the other."""
        length = self.workload.length
        while not self.is_swapped:
            self.check(await self.ask(model, length), length, self.digests[model])

    async def swap(self, number: int) -> None:
        """Ask for others, and put and delete a name of one's own, as the shared count of swaps allows."""
        rng, name = random.Random(number), f"own-{number}"
        while not self.is_swapped:
            self.report.swaps += 1
            await asyncio.sleep(PACE_SECONDS * NUM_SWAPPERS * rng.random())
            other, chance = next(self.others), rng.random()
            if chance < 0.5:
                self.check(await self.ask(other.name, SHORTEST), SHORTEST, other.digest)
            elif chance < 0.85:
                await self.put(name, other)
                self.check(await self.ask(name, SHORTEST), SHORTEST, other.digest)
            else:
                await self.client.delete(f"/v1/adapters/{name}")
                self.check_unknown(await self.ask(name, SHORTEST))

    async def replace(self) -> None:
        """Give one name new weights again and again; whoever asks after that gets them."""
        for turn in range(self.workload.num_replaces):
            adapter = self.adapters[turn % len(self.adapters)]
            await self.put("turning", adapter)
            self.report.replaces += 1
            if turn % 10 == 0 and not self.is_lost:
                self.check(await self.ask("turning", SHORTEST), SHORTEST, adapter.digest)
            await asyncio.sleep(PACE_SECONDS)
        self.is_replaced = True

    async def read_replaced(self) -> None:
        """One stream after the other of the name that is replaced."""
        while not (self.is_replaced or self.is_lost):
            self.check(await self.ask("turning", SHORT), SHORT)

    async def put(self, name: str, adapter: Adapter) -> None:
        response = await self.client.put(f"/v1/adapters/{name}", files=adapter.files)
        if response.json().get("digest") != adapter.digest:
            self.report.problems.append(f"an upload was answered {response.status_code} {response.text[:200]}")

    async def ask(self, model: str, max_tokens: int) -> Streamed:
        """One greedy stream; an answer that is none has its error."""
        async with self.client.stream("POST", "/v1/chat/completions", json=_body(model, max_tokens)) as response:
            said = Streamed(dict(response.headers))
            if response.status_code != 200:
                said.error = httpx.Response(response.status_code, content=await response.aread()).json()["error"]
            async for line in response.aiter_lines():
                if line.startswith("data: ") and said.error is None:
                    read_event(said, line.removeprefix("data: "))
        return said

    async def ask_whole(self, model: str, max_tokens: int) -> Streamed:
        """The same, not streamed, and a look at how close the likeliest two tokens were."""
        body = _body(model, max_tokens) | {"stream": False, "top_logprobs": 2}
        response = (await self.client.post("/v1/chat/completions", json=body)).raise_for_status()
        choice = response.json()["choices"][0]
        for token in choice["logprobs"]["content"]:
            first, second = (top["logprob"] for top in token["top_logprobs"])
            self.report.closest = min(self.report.closest, first - second)
            self.report.ties += first - second <= 2 * TOLERANCE
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        reason = choice["finish_reason"]
        return Streamed(dict(response.headers), choice["token_ids"], logprobs, finish_reason=reason)

    def check(self, said: Streamed, max_tokens: int, digest: str | None = None) -> None:
        """`said` must be what its own digest says alone, and `digest` be that one when it is known."""
        if said.error is not None and said.error["code"] == "memory_full":
            self.report.refused += 1
            return
        own = said.headers.get("x-swaplora-digest", "")
        name = said.headers.get("x-swaplora-adapter", BASE)
        if digest not in (None, own) and said.error is None:
            self.report.problems.append(f"{name} answered as {own or BASE}, and is {digest or BASE}")
        elif (wrong := _difference(said, self.alone.get(own), max_tokens)) is not None:
            self.report.problems.append(f"{name} {wrong}")
        self.report.answers += 1
        self.report.tokens += len(said.token_ids)

    def check_unknown(self, said: Streamed) -> None:
        if said.error is None or said.error["code"] != "model_not_found":
            self.report.problems.append(f"a deleted name was answered by {said.headers.get('x-swaplora-adapter')}")


def _body(model: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "logprobs": True,
        "return_token_ids": True,
    }


def _difference(said: Streamed, alone: Streamed | None, max_tokens: int) -> str | None:
    """What tells `said` from the first tokens of what the same digest says alone, or None."""
    if said.error is not None:
        return f"ended with {said.error['code']}: {said.error['message']}"
    if alone is None:
        return "was answered by a digest that nobody uploaded"
    pairs = zip(said.token_ids, said.logprobs, alone.token_ids, alone.logprobs, strict=False)
    for number, (token, logprob, expected, expected_logprob) in enumerate(pairs):
        if token != expected or not abs(logprob - expected_logprob) <= TOLERANCE:
            return f"says something else from token {number} on"
    is_whole = len(said.token_ids) == len(said.logprobs) == max_tokens and said.finish_reason == "length"
    return None if is_whole else f"ended after {len(said.token_ids)} tokens: {said.finish_reason}"


def make_adapter(server: Running, base: Path, folder: Path, number: int) -> Adapter:
    """A seeded adapter of the same shape as all others, uploaded under its folder's name."""
    tiny.save_adapter(folder, base, seed=10 + number, rank=RANK)
    files = {"config": (folder / CONFIG_FILE).read_bytes(), "weights": (folder / WEIGHTS_FILE).read_bytes()}
    return Adapter(folder.name, files, server.put(folder.name, folder).json()["digest"])


def make_server(folder: Path) -> tuple[Settings, Path]:
    """How to start a server with memory for just NUM_RESIDENT adapters, and its base."""
    model = {**tiny.LLAMA, "max_position_embeddings": CONTEXT}
    base = tiny.save_tiny_base(folder / "base", model, seed=BASE_SEED)
    sample = load_file(tiny.save_adapter(folder / "sample", base, seed=0, rank=RANK) / WEIGHTS_FILE)
    budget = NUM_RESIDENT * sum(tensor.nbytes for tensor in sample.values())
    return settings(base, folder / "data", adapter_memory_bytes=budget), base


def prove(workload: Workload, fault: str | None = None) -> Report:
    """Run the proof on a server of its own."""
    report, began = Report(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch, capture_logs() as report.log:
        if fault is not None:
            FAULTS[fault](patch)
        report.count_loads(patch)
        config, base = make_server(Path(scratch))
        with serving(config) as server:
            adapters = [make_adapter(server, base, Path(scratch) / f"a{n}", n) for n in range(NUM_ADAPTERS)]
            asyncio.run(_run(server, adapters, report, workload))
            gc.collect()
    report.seconds = time.monotonic() - began
    return report


async def _run(server: Running, adapters: list[Adapter], report: Report, workload: Workload) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        await Proof(client, adapters, report, workload).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=size(200, 10_000), help="how often to swap under long streams")
    parser.add_argument("--replaces", type=int, default=size(50, 1000), help="how often to replace one name")
    parser.add_argument("--fault", choices=sorted(FAULTS), help="a fault to plant first")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT still reads a property that transformers has renamed
    report = prove(Workload(arguments.swaps, arguments.replaces), arguments.fault)
    Console().print(report.table())
    for line in [*report.problems[:MAX_PROBLEMS], *(f"the server's log: {entry}" for entry in report.log)]:
        Console().print(line, markup=False, highlight=False)
    if report.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
