"""Adapters that come, are used and go, ten thousand times if need be, leave nothing behind, however it went."""

import asyncio
import gc
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from rich.console import Console

from adapter_files import config_bytes, write_adapter
from isolation_report import Report
from serving import Running
from soak import size
from swaplora_adapters.files.naming import WEIGHTS_FILE

NUM_CYCLES = size(300, 10_000)
NUM_WARM_UP = 50
MAX_MIB_PER_1000 = size(30, 1)  # a short run also sees the allocator settle
PROMPT = list(range(40, 60))
NAMES = "names"  # the folder of descriptions
MAX_DESCRIPTION_BYTES = 4096


@dataclass(frozen=True)
class Held:
    """What a server holds on to while nothing runs."""

    resident_bytes: int
    num_free_blocks: int
    num_adapters: int
    files: frozenset[str]
    threads: tuple[str, ...]
    num_descriptors: int


def held_by(server: Running) -> Held:
    """Counted with the server idle; `wait_idle` has checked that no lease is out and no removal pending.

    A name that was used keeps its description, which says that it was deleted.
    The event loop's pool of threads has a bound of its own, and fills up to it as chance will have it.
    """
    server.wait_idle()
    data_dir, names = server.service.settings.data_dir, [thread.name for thread in threading.enumerate()]
    return Held(
        resident_bytes=server.service.registry.resident_bytes,
        num_free_blocks=server.service.engine.snapshot().num_free_blocks,
        num_adapters=len(server.client.get("/v1/adapters").json()["data"]),
        files=frozenset(
            str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if path.parent != data_dir / NAMES
        ),
        threads=tuple(sorted(name for name in names if not name.startswith(("asyncio_", "uvloop_")))),
        num_descriptors=len(os.listdir("/proc/self/fd")),
    )


def at_rest(server: Running) -> Held:
    """What `server` holds when it has been the same for a second."""
    held = [held_by(server)]
    while len(held) < 10 or len(set(held[-10:])) > 1:
        time.sleep(0.1)
        held.append(held_by(server))
    return held[-1]


def comes_back_to(before: Held, server: Running) -> Held:
    """What `server` holds once that is as before: the last connections may still be closing."""
    deadline = time.monotonic() + 60
    while (held := held_by(server)) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    return held


def resident_mib() -> float:
    """This process's memory, its garbage collected: server and client are both in it."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def slope(samples: list[tuple[int, float]]) -> float:
    """MiB per 1,000 cycles over the later half of (cycle, MiB)."""
    cycles, mib = zip(*samples[len(samples) // 2 :], strict=True)
    return float(np.polyfit(cycles, mib, 1)[0]) * 1000


@dataclass(frozen=True)
class Cycle:
    """One adapter's coming, use and going. Its bytes and its name were never seen before."""

    client: httpx.AsyncClient
    weights: bytes
    number: int

    @property
    def name(self) -> str:
        return f"cycle-{self.number}"

    async def run(self, rng: random.Random) -> None:
        if self.number % 10 == 9:
            await self.be_refused(rng)
            return
        response = await self.put(config_bytes(lora_alpha=1 + self.number / 1000), self.weights)
        assert response.status_code == 201, response.text
        use = (self.answer, self.answer_four, self.leave, self.leave_stream)[self.number % 4]
        await use(rng)
        response = await self.client.delete(f"/v1/adapters/{self.name}")
        assert response.json()["state"] == "deleted", response.text

    async def put(self, config: bytes, weights: bytes) -> httpx.Response:
        return await self.client.put(f"/v1/adapters/{self.name}", files={"config": config, "weights": weights})

    async def be_refused(self, rng: random.Random) -> None:
        """Files cut short anywhere, or a config that does not fit them."""
        cut = rng.randrange(len(self.weights))
        config, weights = rng.choice(
            [(config_bytes(), self.weights[:cut]), (config_bytes(r=5), self.weights), (b"{", self.weights)]
        )
        response = await self.put(config, weights)
        assert response.status_code == 422, response.text
        assert (await self.client.get(f"/v1/adapters/{self.name}")).status_code == 404

    async def answer(self, _rng: random.Random) -> None:
        response = await self.client.post("/v1/completions", json=self.body(4))
        assert response.status_code == 200, response.text

    async def answer_four(self, _rng: random.Random) -> None:
        response = await self.client.post("/v1/completions", json=self.body(4, n=4))
        assert response.status_code == 200, response.text
        assert len(response.json()["choices"]) == 4

    async def leave(self, rng: random.Random) -> None:
        """A client that does not wait for its answer."""
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(rng.uniform(0, 0.03)):
                await self.client.post("/v1/completions", json=self.body(400, n=2))

    async def leave_stream(self, rng: random.Random) -> None:
        """A client that goes in the middle of a stream."""
        async with self.client.stream("POST", "/v1/completions", json=self.body(400, stream=True)) as response:
            lines = response.aiter_lines()
            for _ in range(rng.randrange(6)):
                await anext(lines)

    def body(self, max_tokens: int, **fields: Any) -> dict[str, Any]:
        sampling = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return {"model": self.name, "prompt": PROMPT, **sampling, **fields}


async def cycle(server: Running, weights: bytes, numbers: range) -> list[tuple[int, float]]:
    """Run some cycles; the process's memory after every twentieth."""
    rng, samples = random.Random(numbers.start), []
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        for number in numbers:
            await Cycle(client, weights, number).run(rng)
            if number % 20 == 0:
                samples.append((number, resident_mib()))
    return samples


def test_adapters_that_come_and_go_leave_nothing_behind(server: Running, tmp_path: Path) -> None:
    weights = (write_adapter(tmp_path / "any", seed=1) / WEIGHTS_FILE).read_bytes()
    asyncio.run(cycle(server, weights, range(NUM_WARM_UP)))  # pools of threads and connections are filled once
    before = at_rest(server)
    samples = asyncio.run(cycle(server, weights, range(NUM_WARM_UP, NUM_WARM_UP + NUM_CYCLES)))
    assert comes_back_to(before, server) == before
    growth = slope(samples)
    left = {path.name: path.stat().st_size for path in (server.service.settings.data_dir / NAMES).iterdir()}
    assert left.keys() == {f"cycle-{number}" for number in range(NUM_WARM_UP + NUM_CYCLES) if number % 10 != 9}
    assert max(left.values()) <= MAX_DESCRIPTION_BYTES
    said = f"{NUM_CYCLES} cycles: {growth:+.2f} MiB per 1,000 over the later half, {samples[-1][1]:.0f} MiB at the end"
    Console().print(f"\n{said}")
    assert growth < MAX_MIB_PER_1000


def test_a_deleted_adapter_is_out_of_memory_before_any_garbage_is_collected(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (write_adapter(tmp_path / "any", seed=1) / WEIGHTS_FILE).read_bytes()
    report = Report()
    report.count_loads(monkeypatch)
    gc.disable()
    try:
        asyncio.run(cycle(server, weights, range(100_001, 100_020)))  # without a look at the process's memory
        server.wait_idle()
        num_loaded, num_freed = report.loads, report.freed
    finally:
        gc.enable()
    assert num_loaded > 10
    assert num_freed == num_loaded
