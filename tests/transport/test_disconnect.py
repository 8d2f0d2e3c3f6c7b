"""A client that goes away costs nothing from the next step on, however its request was made."""

import asyncio
import random
import threading
from pathlib import Path

import httpx
import pytest

from serving import BASE, Running
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.engine.scheduling.batch import Batch

PROMPT = list(range(40, 60))
MAX_TOKENS = 400
GUARD_SECONDS = 60
LONG = {"prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def loaded(server: Running, adapters: list[Path]) -> Running:
    server.put("gone", adapters[3])
    return server


async def leave_after(server: Running, seconds: float, **fields: object) -> None:
    async with httpx.AsyncClient(base_url=server.url) as client:
        with pytest.raises((TimeoutError, asyncio.CancelledError)):
            async with asyncio.timeout(seconds):
                await client.post("/v1/completions", json=LONG | fields)


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("model", [BASE, "gone"])
async def test_a_disconnect_frees_every_block(
    loaded: Running, model: str, is_streaming: bool, steps: list[Batch]
) -> None:
    async with httpx.AsyncClient(base_url=loaded.url, timeout=GUARD_SECONDS) as client:
        body = LONG | {"model": model, "stream": is_streaming, "n": 4}
        asked = asyncio.create_task(client.post("/v1/completions", json=body))
        while loaded.service.engine.snapshot().num_running < 4:
            assert not asked.done()
            await asyncio.sleep(0.005)
        snapshot = loaded.service.engine.snapshot()
        assert snapshot.num_free_blocks < snapshot.num_blocks
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    await asyncio.to_thread(loaded.wait_idle)
    assert len(steps) < MAX_TOKENS  # so that it did not end by itself
    assert loaded.client.get("/v1/adapters/gone").json()["in_flight"] == 0


async def test_sixty_disconnects_at_random_moments_leave_nothing_behind(loaded: Running) -> None:
    rng = random.Random(7)
    for _ in range(6):
        moments = [rng.uniform(0.005, 0.25) for _ in range(10)]
        await asyncio.gather(
            *(
                leave_after(loaded, moment, model=rng.choice([BASE, "gone"]), stream=rng.random() < 0.5)
                for moment in moments
            )
        )
    await asyncio.to_thread(loaded.wait_idle)
    assert loaded.client.delete("/v1/adapters/gone").json()["state"] == "deleted"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_client_that_does_not_wait_for_a_cold_adapter_is_forgotten(
    server: Running,
    adapters: list[Path],
    path: str,
    is_streaming: bool,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[Batch],
) -> None:
    load = server.service.registry._loader.load  # noqa: SLF001
    has_begun, may_end = threading.Event(), threading.Event()

    def held(digest: str) -> AdapterWeights:
        has_begun.set()
        assert may_end.wait(GUARD_SECONDS)
        return load(digest)

    monkeypatch.setattr(server.service.registry._residency, "_load", held)  # noqa: SLF001
    server.put("cold", adapters[5])
    body = LONG | {"model": "cold", "stream": is_streaming, "n": 4, "messages": [{"role": "user", "content": "x"}]}
    async with httpx.AsyncClient(base_url=server.url) as client:
        asked = asyncio.create_task(client.post(path, json=body))
        assert await asyncio.to_thread(has_begun.wait, GUARD_SECONDS)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    async with asyncio.timeout(GUARD_SECONDS):
        while server.client.get("/v1/adapters/cold").json()["in_flight"]:
            await asyncio.sleep(0.01)
    may_end.set()
    await asyncio.to_thread(server.wait_idle)
    assert steps == []
    server.client.delete("/v1/adapters/cold")


async def test_waiting_requests_can_be_abandoned_too(loaded: Running) -> None:
    await asyncio.gather(*(leave_after(loaded, 0.2, model=BASE, n=16) for _ in range(8)))
    await asyncio.to_thread(loaded.wait_idle)


def test_a_stop_string_ends_the_sequence_in_the_engine_as_well(loaded: Running, steps: list[Batch]) -> None:
    whole = loaded.generate("gone", PROMPT, max_tokens=40, ignore_eos=True).json()["choices"][0]
    stop = whole["text"][5:7]
    choice = loaded.generate("gone", PROMPT, max_tokens=400, ignore_eos=True, stop=stop).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == whole["text"][: whole["text"].index(stop)]
    loaded.wait_idle()
    assert len(steps) < MAX_TOKENS
