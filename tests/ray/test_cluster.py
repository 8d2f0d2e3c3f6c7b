"""Two nodes with a replica on each, and real engines: what one machine says two say, also when one of them goes."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.util import list_named_actors

import tiny
from clusters import Front, Nodes, in_front, ray_nodes
from oracle import Oracle
from serving import BASE, Running, Streamed, serving, settings, stream_chat
from sixteen_adapters import SHAPES, TOLERANCE, error_against
from swaplora_server.cluster.build import application_of, engines
from swaplora_server.cluster.ingress import PART_BYTES
from swaplora_server.config import Settings

NUM_ADAPTERS = 8
NAMES = [f"s{number}" for number in range(NUM_ADAPTERS)]
_OWN = re.compile(rb'([a-z]+[-_])[0-9a-f]{32}|("(?:created|created_at|completed_at)":)[0-9.e+]+')
_NEW = ("connection", "date", "x-request-id")


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that all replicas read."""
    folder = tmp_path_factory.mktemp("shared")
    for seed, (name, shape) in enumerate(zip(NAMES, SHAPES, strict=False)):
        tiny.save_adapter(folder / name, base, seed=seed, **shape)
    return folder


@pytest.fixture(scope="module")
def config(base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    own = {"adapter_dir": folder, "prefix_cache": False, "drain_seconds": 60, "max_body_bytes": 1 << 20}
    return settings(base, tmp_path_factory.mktemp("replicas"), ray=True, ray_replicas="2", ray_cpus=2, **own)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ray_nodes(2, cpus=3) as found:
        yield found


@pytest.fixture(scope="module")
def front(config: Settings, nodes: Nodes) -> Iterator[Front]:
    with in_front(config) as found:
        yield found


@pytest.fixture(scope="module")
def one(config: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same on one machine."""
    fields = {"ray": False, "ray_replicas": None, "ray_cpus": None, "data_dir": tmp_path_factory.mktemp("one")}
    with serving(config.model_copy(update=fields)) as running:
        yield running


def chat(name: str, **fields: Any) -> dict[str, Any]:
    return {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0, **fields}


REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "stream": ("POST", "/v1/chat/completions", {"json": chat("s1", stream=True)}),
    "messages": ("POST", "/v1/messages", {"json": chat("s2", stream=True)}),
    "responses": ("POST", "/v1/responses", {"json": {"model": "s3", "input": "hi", "temperature": 0, "stream": True}}),
    "a sum": ("POST", "/v1/chat/completions", {"json": chat(BASE, adapters=[{"name": "s1"}, {"name": "s3"}])}),
    "no json": ("POST", "/v1/completions", {"content": b"{"}),
    "an unknown field": ("POST", "/v1/completions", {"json": {**chat("s1"), "beam_width": 3}}),
    "an unknown model": ("POST", "/v1/chat/completions", {"json": chat("nobody")}),
    "too large": ("POST", "/v1/completions", {"content": b" " * (2 << 20)}),
    "no route": ("GET", "/nope", {}),
    "head": ("HEAD", "/v1/models", {}),
    "another host": ("GET", "/v1/models", {"headers": {"host": "evil.example"}}),
    "no evaluation": ("GET", "/v1/evaluations/nobody", {}),
    "the page": ("GET", "/ui", {}),
    "ready": ("GET", "/health/ready", {}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answer_is_that_of_one_machine(one: Running, front: Front, name: str) -> None:
    method, path, request = REQUESTS[name]

    def seen(client: httpx.Client) -> tuple[int, dict[str, str], bytes]:
        answer = client.request(method, path, **request)
        headers = {name: value for name, value in answer.headers.items() if name not in _NEW}
        return answer.status_code, headers, _OWN.sub(rb"\1\2", answer.content)

    assert seen(front.client) == seen(one.client)


def test_each_answer_is_of_the_adapter_that_was_asked(front: Front, base: Path, folder: Path) -> None:
    """Of all adapters at once over both replicas, several times, against PEFT."""
    oracles = {name: Oracle(base, folder / name) for name in NAMES}

    async def ask() -> list[Streamed]:
        async with httpx.AsyncClient(base_url=front.url, timeout=600) as client:
            asked = (stream_chat(client, name, f"question {name}", 16, ignore_eos=True) for name in NAMES * 2)
            return await asyncio.gather(*asked)

    for name, said in zip(NAMES * 2, asyncio.run(ask()), strict=True):
        assert said.is_done
        assert said.headers["x-swaplora-adapter"] == f"{name}@1"
        assert error_against(oracles[name], name, said) < TOLERANCE
    per_replica = [stats["resident"] for stats in front.ask_replicas("record_routing_stats")]
    assert len(per_replica) == 2
    assert set(per_replica[0]) | set(per_replica[1]) == set(NAMES)


def test_a_clients_going_ends_its_request(front: Front) -> None:
    before = _abandoned(front)
    body = chat("s4", max_tokens=480, ignore_eos=True, stream=True, n=16)
    with front.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    while sum(stats["running"] for stats in front.ask_replicas("record_routing_stats")):
        time.sleep(0.05)
    assert _abandoned(front) == before + 1


def test_an_upload_reaches_one_replica_in_parts(front: Front, adapters: list[Path]) -> None:
    files = {"config": b"{", "weights": b"x" * (2 * PART_BYTES)}
    assert front.client.put("/v1/adapters/refused", files=files).status_code == 422
    names = ("adapter_config.json", "adapter_model.safetensors")
    config, weights = ((adapters[3] / name).read_bytes() for name in names)
    answer = front.client.put("/v1/adapters/up", files={"config": config, "weights": weights})
    assert answer.status_code == 201, answer.text
    for _ in range(4):  # whichever is asked, it is found where it is
        assert front.client.get("/v1/adapters/up").json()["digest"] == answer.json()["digest"]
    assert front.client.delete("/v1/adapters/up").status_code in (200, 202)


def test_metrics_are_each_replicas(front: Front) -> None:
    lines = front.client.get("/metrics").text.splitlines()
    replicas = {match[1] for line in lines if (match := re.search('replica="([^"]+)"', line))}
    assert len(replicas) == 2


class Streams:
    """Long streams of all adapters, each in a thread of its own."""

    def __init__(self, front: Front, max_tokens: int, count: int) -> None:
        self._front = front
        self._max_tokens = max_tokens
        self._begun = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(count)
        self._results = [self._pool.submit(self._one, NAMES[number % NUM_ADAPTERS]) for number in range(count)]
        for _ in range(count):
            self._begun.acquire()

    def ended(self) -> list[tuple[str, list[int], list[str]]]:
        """Of each the name, its token ids, and the codes of its errors; every one has ended by [DONE]."""
        with self._pool:
            return [result.result() for result in self._results]

    def _one(self, name: str) -> tuple[str, list[int], list[str]]:
        body = chat(name, max_tokens=self._max_tokens, ignore_eos=True, stream=True, return_token_ids=True)
        ids: list[int] = []
        errors: list[str] = []
        last = ""
        with httpx.stream("POST", f"{self._front.url}/v1/chat/completions", json=body, timeout=300) as answer:
            assert answer.status_code == 200, answer.read()
            is_begun = False
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                last = line.removeprefix("data: ")
                chunk = json.loads(last) if last != "[DONE]" else {}
                errors += [chunk["error"]["code"]] if "error" in chunk else []
                ids += [token for choice in chunk.get("choices", ()) for token in choice.get("token_ids", ())]
                if ids and not is_begun:
                    is_begun = True
                    self._begun.release()
        assert last == "[DONE]"
        return name, ids, errors


def expected(one: Running, max_tokens: int) -> dict[str, list[int]]:
    found = {}
    for name in NAMES:
        body = chat(name, max_tokens=max_tokens, ignore_eos=True, return_token_ids=True)
        answer = one.client.post("/v1/chat/completions", json=body).json()
        found[name] = answer["choices"][0]["token_ids"]
    return found


def test_fewer_replicas_end_what_runs_first(front: Front, one: Running, config: Settings) -> None:
    """From two to one and back, under streams on both: each ends whole, and what comes meanwhile is answered."""
    right = expected(one, 300)
    streams = Streams(front, 300, NUM_ADAPTERS)
    running = [stats["running"] for stats in front.ask_replicas("record_routing_stats")]
    assert all(running), running
    _scale(config, "1")
    meanwhile = [front.client.post("/v1/chat/completions", json=chat(name)).status_code for name in NAMES]
    assert meanwhile == [200] * NUM_ADAPTERS
    assert [(name, ids == right[name], errors) for name, ids, errors in streams.ended()] == [
        (name, True, []) for name in NAMES
    ]
    assert len(front.ask_replicas("record_routing_stats")) == 1
    _scale(config, "2")
    assert len(front.ask_replicas("record_routing_stats")) == 2


def test_an_upload_goes_on_at_a_replica_that_ends(front: Front, config: Settings) -> None:
    """What is under way on both, when one of them is not chosen any more: each has the rest of its body."""
    files = {"config": b"{", "weights": b"x" * (3 * PART_BYTES)}
    whole = httpx.Request("PUT", front.url, files=files)
    body = whole.read()
    goes_on = threading.Event()
    begun = threading.Semaphore(0)

    def parts() -> Iterator[bytes]:
        yield body[: 2 * PART_BYTES]
        begun.release()
        goes_on.wait()
        yield body[2 * PART_BYTES :]

    def put(number: int) -> int:
        headers = {"content-type": whole.headers["content-type"]}
        url = f"{front.url}/v1/adapters/ending{number}"
        return httpx.put(url, content=parts(), headers=headers, timeout=60).status_code

    with ThreadPoolExecutor(6) as pool:
        try:
            uploads = [pool.submit(put, number) for number in range(6)]
            for _ in uploads:
                begun.acquire()
            time.sleep(1)  # each has its first part
            scaling = threading.Thread(target=_scale, args=(config, "1"))
            scaling.start()
            while len(front.ask_replicas("record_routing_stats")) == 2:
                time.sleep(0.1)
        finally:
            goes_on.set()
        assert [upload.result() for upload in uploads] == [422] * 6
    scaling.join()
    _scale(config, "2")


def test_a_new_release_comes_while_the_old_one_ends(front: Front, one: Running, config: Settings) -> None:
    """Each replica is replaced, under streams that end whole and requests that are all answered."""
    right = expected(one, 300)
    before = {stats["capacity"] for stats in front.ask_replicas("record_routing_stats")}
    streams = Streams(front, 300, NUM_ADAPTERS)
    has_come = threading.Event()
    statuses: list[int] = []

    def ask_on() -> None:
        while not has_come.is_set():
            name = NAMES[len(statuses) % NUM_ADAPTERS]
            statuses.append(httpx.post(f"{front.url}/v1/chat/completions", json=chat(name), timeout=60).status_code)

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        newer = config.model_copy(update={"max_num_seqs": 32})
        serve.run(engines(newer), name=application_of(newer), route_prefix=None)
    finally:
        has_come.set()
        asking.join()
    assert [(name, ids == right[name], errors) for name, ids, errors in streams.ended()] == [
        (name, True, []) for name in NAMES
    ]
    assert set(statuses) == {200}
    assert before == {64}
    assert {stats["capacity"] for stats in front.ask_replicas("record_routing_stats")} == {32}


def test_a_killed_replica_ends_its_streams_with_an_error(front: Front, one: Running) -> None:
    """And no others; none has an answer that is not its own."""
    right = expected(one, 300)
    streams = Streams(front, 300, NUM_ADAPTERS)
    victims = [each for each in list_named_actors(all_namespaces=True) if "#Engine#" in each["name"]]
    assert len(victims) == 2
    ray.kill(ray.get_actor(victims[0]["name"], namespace=victims[0]["namespace"]))
    ended = streams.ended()
    lost = [(name, ids) for name, ids, errors in ended if errors]
    assert {code for _, _, errors in ended for code in errors} == {"engine_failed"}
    assert 0 < len(lost) < NUM_ADAPTERS
    for name, ids, errors in ended:
        assert ids == right[name] if not errors else ids == right[name][: len(ids)] and len(ids) < 300
    for name in NAMES:
        answer = front.client.post("/v1/chat/completions", json=chat(name, ignore_eos=True, return_token_ids=True))
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == right[name][:8]


def _scale(config: Settings, replicas: str) -> None:
    """Have another number of the same replicas: those of up to two, so that nothing else changes."""
    bound = engines(config)
    deployment = bound._bound_deployment.options(num_replicas=int(replicas))  # noqa: SLF001
    again = deployment.bind(*deployment.init_args, **deployment.init_kwargs)
    serve.run(again, name=application_of(config), route_prefix=None)


def _abandoned(front: Front) -> float:
    """How many requests ended because their client went, of both replicas."""
    lines = front.client.get("/metrics").text.splitlines()
    mine = [line for line in lines if re.match('swaplora_generations_total{.*outcome="abandoned"', line)]
    return sum(float(line.split()[-1]) for line in mine)
