"""Where memory for adapters is short: a request has all of its adapters or none, and costs nobody who is served."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

import tiny
from serving import BASE, Running, serving, settings
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_adapters.registry.leases import RequestLeases
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base.base_model import BaseModel

GUARD_SECONDS = 60
NAMES = [f"t{number}" for number in range(5)]
PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("short")
    return {name: tiny.save_adapter(folder / name, base, seed=20 + n, rank=8) for n, name in enumerate(NAMES)}


Open = Callable[..., Running]


@pytest.fixture
def open_server(base: Path, folders: dict[str, Path], tmp_path: Path) -> Iterator[Open]:
    """Servers with memory for some of these adapters, which all are the same size."""
    nbytes = sum(tensor.nbytes for tensor in load_file(folders["t0"] / WEIGHTS_FILE).values())
    with ExitStack() as stack:

        def open_server(num_adapters: int, **fields: Any) -> Running:
            memory = num_adapters * nbytes + nbytes // 2
            config = settings(base, tmp_path / "data", adapter_memory_bytes=memory, **fields)
            server = stack.enter_context(serving(config))
            for name, folder in folders.items():
                assert server.put(name, folder).status_code == 201
            return server

        yield open_server


@contextmanager
def running_on(server: Running, *names: str) -> Iterator[RequestLeases]:
    """A request that lasts as long as the body does."""
    request_leases = server.service.registry.lease_weights([server.service.registry.lease(name) for name in names])
    try:
        request_leases.weights.result(GUARD_SECONDS)
        yield request_leases
    finally:
        request_leases.release()


def sum_of(*names: str, **fields: Any) -> dict[str, Any]:
    terms = [{"name": name, "scale": 0.5} for name in names]
    return {"model": BASE, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "adapters": terms} | fields


def ask(server: Running, body: dict[str, Any]) -> httpx.Response:
    return server.client.post("/v1/completions", json=body | {"return_token_ids": True})


def in_flight(server: Running, name: str) -> int:
    return int(server.client.get(f"/v1/adapters/{name}").json()["in_flight"])


async def until_waiting(server: Running, name: str) -> None:
    """Until a request that names it has been admitted, and stands in line."""
    async with asyncio.timeout(GUARD_SECONDS):
        while server.service.registry.card(name).state != "loading":
            await asyncio.sleep(0.005)


def test_a_sum_that_can_never_fit_is_refused_at_once_with_the_numbers(open_server: Open) -> None:
    server = open_server(2)
    with running_on(server, "t3"):
        refused = ask(server, sum_of("t0", "t1", "t2"))
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (413, "adapter_too_large", "adapters")
        assert str(server.service.settings.adapter_memory_bytes) in error["message"]
        assert "retry-after" not in refused.headers
        assert ask(server, {"model": "t3", "prompt": PROMPT}).status_code == 200
    assert server.client.patch("/v1/adapters/t0", json={"pinned": True}).status_code == 200
    refused = ask(server, sum_of("t1", "t2"))
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (507, "memory_full", "adapters")
    assert "pinned" in error["message"]
    assert ask(server, sum_of("t0", "t1")).status_code == 200
    assert [in_flight(server, name) for name in NAMES] == [0] * 5


async def test_sums_over_different_pairs_are_all_served_where_one_pair_has_room(open_server: Open) -> None:
    server = open_server(2)
    pairs = [(a, b) for a in NAMES for b in NAMES if a != b]
    alone = {pair: ask(server, sum_of(*pair)).json()["choices"][0]["token_ids"] for pair in pairs}
    async with httpx.AsyncClient(base_url=server.url, timeout=GUARD_SECONDS) as client:
        bodies = [sum_of(*pair, return_token_ids=True, n=1 + n % 3) for n, pair in enumerate(pairs)]
        singles = [{"model": name, "prompt": PROMPT, "max_tokens": 8} for name in NAMES]
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies + singles))
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    for pair, answer in zip(pairs, answers, strict=False):
        assert all(choice["token_ids"] == alone[pair] for choice in answer.json()["choices"])
    assert [in_flight(server, name) for name in NAMES] == [0] * 5


async def test_no_memory_is_held_while_a_term_is_looked_for(open_server: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    server = open_server(1)
    is_looking, is_found = threading.Event(), threading.Event()

    async def resolve(_reference: str, _peer: str) -> bool:
        is_looking.set()
        await asyncio.to_thread(is_found.wait, GUARD_SECONDS)
        return False

    monkeypatch.setattr(server.service.ingest, "resolve", resolve)
    async with httpx.AsyncClient(base_url=server.url, timeout=GUARD_SECONDS) as client:
        asked = asyncio.create_task(client.post("/v1/completions", json=sum_of("t0", "ghost")))
        assert await asyncio.to_thread(is_looking.wait, GUARD_SECONDS)
        for name in ("t1", "t0", "t2"):
            assert (await asyncio.to_thread(ask, server, {"model": name, "prompt": PROMPT})).status_code == 200
        is_found.set()
        error = (await asked).json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "adapters[1].name")
    assert in_flight(server, "t0") == 0


async def test_hot_adapters_are_served_while_a_cold_one_waits_for_their_streams(open_server: Open) -> None:
    server = open_server(2)
    async with httpx.AsyncClient(base_url=server.url, timeout=GUARD_SECONDS) as client:
        with running_on(server, "t0"):
            with running_on(server, "t1"):
                cold = asyncio.create_task(client.post("/v1/completions", json={"model": "t2", "prompt": PROMPT}))
                await until_waiting(server, "t2")
                for name in ("t0", "t1") * 10:
                    hot = await client.post("/v1/completions", json={"model": name, "prompt": PROMPT})
                    assert hot.status_code == 200
                assert not cold.done()
            assert (await cold).status_code == 200


async def test_what_waits_for_memory_is_bound_to_its_version_and_leaves_with_its_client(
    open_server: Open, folders: dict[str, Path]
) -> None:
    server = open_server(1)
    async with httpx.AsyncClient(base_url=server.url, timeout=GUARD_SECONDS) as client:
        with running_on(server, "t0"):
            bound = asyncio.create_task(client.post("/v1/completions", json={"model": "t1", "prompt": PROMPT}))
            deleted = asyncio.create_task(client.post("/v1/completions", json={"model": "t2", "prompt": PROMPT}))
            left = asyncio.create_task(client.post("/v1/completions", json={"model": "t3", "prompt": PROMPT}))
            for name in ("t1", "t2", "t3"):
                await until_waiting(server, name)
            assert (await asyncio.to_thread(server.put, "t1", folders["t4"])).json()["version"] == 2
            gone = await client.delete("/v1/adapters/t2?timeout=0")
            assert (gone.status_code, gone.json()["state"]) == (202, "draining")
            left.cancel()
            async with asyncio.timeout(GUARD_SECONDS):
                while server.service.registry.card("t3").state == "loading":
                    await asyncio.sleep(0.005)
            assert in_flight(server, "t3") == 0
        assert (await bound).headers["x-swaplora-adapter"] == "t1@1"
        assert (await deleted).headers["x-swaplora-adapter"] == "t2@1"
        assert (await client.post("/v1/completions", json={"model": "t2", "prompt": PROMPT})).status_code == 404


def test_who_finds_no_room_in_time_is_told_how_long_it_waited(open_server: Open) -> None:
    server = open_server(1, adapter_wait_seconds=0)
    with running_on(server, "t0"):
        for body, param in [({"model": "t1", "prompt": PROMPT}, "model"), (sum_of("t2"), "adapters[0].name")]:
            refused = ask(server, body)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["param"]) == (507, "memory_full", param)
            assert "within 0 seconds" in error["message"]
            assert refused.headers["retry-after"] == "5"
        assert ask(server, {"model": "t0", "prompt": PROMPT}).status_code == 200
        assert server.client.post("/v1/adapters/t1/warm").status_code == 507
    assert ask(server, {"model": "t1", "prompt": PROMPT}).status_code == 200


def test_a_term_that_cannot_be_loaded_is_named_and_frees_the_others(
    open_server: Open, folders: dict[str, Path]
) -> None:
    server = open_server(2)
    digest = server.client.get("/v1/adapters/t1").json()["digest"]
    (weights,) = server.service.settings.data_dir.rglob(f"{digest.removeprefix('sha256:')}/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    refused = ask(server, sum_of("t0", "t1"))
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (409, "adapter_failed", "adapters[1].name")
    reason = "t1@1: its stored files no longer have the digest that they were stored with"
    assert reason in error["message"]
    assert (
        server.client.put("/v1/aliases/split", json={"targets": [{"target": "t1@1", "weight": 1}]}).status_code == 200
    )
    client = server.client
    assert server.put("t1", folders["t2"]).status_code == 200
    for answer in (
        client.get("/v1/models/t1@1"),
        client.patch("/v1/adapters/t1", json={"current": 1}),
        client.post("/v1/merged", json={"name": "new", "from": [{"name": "t1@1"}]}),
        ask(server, {"model": "split", "prompt": PROMPT}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_failed")
        assert reason in answer.json()["error"]["message"]
    assert client.get("/v1/models/t1").status_code == 200
    assert server.client.get("/v1/adapters/t1").json()["version"] == 2
    assert ask(server, sum_of("t2", "t3")).status_code == 200
    assert ask(server, {"model": "t0", "prompt": PROMPT}).status_code == 200
    assert [in_flight(server, name) for name in NAMES] == [0] * 5


def test_the_same_bytes_under_two_names_count_once(open_server: Open, folders: dict[str, Path]) -> None:
    server = open_server(1)
    server.put("twin", folders["t0"])
    server.client.put("/v1/aliases/same", json={"target": "t0"})
    assert ask(server, sum_of("t0", "twin", "same")).status_code == 200
    assert ask(server, sum_of("t0", "t1")).status_code == 413


def test_what_is_compared_is_in_memory_together(open_server: Open) -> None:
    server = open_server(1)
    assert server.client.get("/v1/adapters/t0/inspect").status_code == 200
    refused = server.client.get("/v1/adapters/t0/inspect?against=t1")
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "adapter_too_large")
    assert [in_flight(server, name) for name in NAMES] == [0] * 5


def test_what_kernels_read_of_an_adapter_is_made_by_the_thread_that_loads_it(
    open_server: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    prepared = BaseModel.prepared

    def noted(self: BaseModel, weights: AdapterWeights) -> AdapterWeights:
        threads.append(threading.current_thread().name)
        return prepared(self, weights)

    monkeypatch.setattr(BaseModel, "prepared", noted)
    server = open_server(2)
    with running_on(server, "t0", "t1") as leases:
        made = leases.weights.result(GUARD_SECONDS).values()
        assert [weights.tables is not None for weights in made] == [True, True]
    assert threads == ["adapter-load_0"] * 2
