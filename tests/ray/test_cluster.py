"""Two nodes with a replica on each, and real engines: what one machine says two say, also when one of them goes."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import ray
from ray import serve

from clusters import Front, actors
from oracle import Oracle
from serving import BASE, Running, Streamed, stream_chat
from sixteen_adapters import TOLERANCE, error_against
from streams import LONG, NAMES, NUM_ADAPTERS, Streams, asking, chat, expected
from swaplora_server.cluster.build import application_of, engines
from swaplora_server.cluster.front.bodies import PART_BYTES
from swaplora_server.config import Settings

pytestmark = pytest.mark.xdist_group("front")
_OWN = re.compile(rb'([a-z]+[-_])[0-9a-f]{32}|("(?:created|created_at|completed_at)":)[0-9.e+]+')
_NEW = ("connection", "date", "x-request-id")

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


@pytest.fixture(scope="module")
def right(one: Running) -> dict[str, list[int]]:
    return expected(one)


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
    per_replica = [each["resident"] for each in stats(front)]
    assert len(per_replica) == 2
    assert set(per_replica[0]) | set(per_replica[1]) == set(NAMES)


def test_a_clients_going_ends_its_request(front: Front) -> None:
    before = _abandoned(front)
    body = chat("s4", max_tokens=480, ignore_eos=True, stream=True, n=16)
    with front.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    while sum(each["running"] for each in stats(front)):
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


def stats(front: Front) -> list[dict[str, Any]]:
    """What each replica tells."""
    return front.ask_replicas("record_routing_stats")


def test_replicas_follow_the_load(front: Front, right: dict[str, list[int]], config: Settings) -> None:
    """Down under streams and uploads on both, each of which ends whole; and up, with no answer that is not its own."""
    scaling = engines(config.model_copy(update={"ray_replicas": "1-2"}))._bound_deployment  # noqa: SLF001
    own = scaling._deployment_config.autoscaling_config  # noqa: SLF001
    assert (own.min_replicas, own.max_replicas, own.target_ongoing_requests) == (1, 2, 8)
    at_once = own.model_copy(update={"upscale_delay_s": 0, "downscale_delay_s": 0, "look_back_period_s": 1})
    goes_on = threading.Event()
    uploads = Uploads(front.url, 4, goes_on)
    try:
        streams = Streams(front.url, 2)
        deploying = threading.Thread(target=_deploy, args=(config, scaling.options(autoscaling_config=at_once)))
        deploying.start()  # which waits for the one that ends
        while len(stats(front)) == 2:
            time.sleep(0.1)
        meanwhile = [front.client.post("/v1/chat/completions", json=chat(name)).status_code for name in NAMES]
    finally:
        goes_on.set()
    assert meanwhile == [200] * NUM_ADAPTERS
    assert uploads.ended() == [422] * 4
    deploying.join()
    assert [(ids == right[name], errors) for name, ids, errors in streams.ended()] == [(True, [])] * 2
    with asking(front.url, right, 20) as faults:
        while len(told := stats(front)) == 1 or not all(each["resident"] for each in told):
            assert faults == []
            time.sleep(0.1)
    assert faults == []
    _deploy(config, engines(config)._bound_deployment)  # noqa: SLF001
    assert {name for each in stats(front) for name in each["resident"]} >= set(NAMES)


class Uploads:
    """Uploads that are refused once they are whole, which waits; their first parts are there when this is made."""

    def __init__(self, url: str, count: int, goes_on: threading.Event) -> None:
        files = {"config": b"{", "weights": b"x" * (3 * PART_BYTES)}
        self._whole = httpx.Request("PUT", url, files=files)
        self._url, self._goes_on, self._begun = url, goes_on, threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(count)
        self._results = [self._pool.submit(self._put, number) for number in range(count)]
        for _ in range(count):
            self._begun.acquire()

    def ended(self) -> list[int]:
        with self._pool:
            return [result.result() for result in self._results]

    def _put(self, number: int) -> int:
        headers = {"content-type": self._whole.headers["content-type"]}
        url = f"{self._url}/v1/adapters/ending{number}"
        return httpx.put(url, content=self._parts(), headers=headers, timeout=300).status_code

    def _parts(self) -> Iterator[bytes]:
        body = self._whole.read()
        yield body[: 2 * PART_BYTES]
        self._begun.release()
        while not self._goes_on.wait(0.5):
            yield b"x" * 4096  # who sends too little is not waited for
        yield body[2 * PART_BYTES :]


def test_a_new_release_comes_while_the_old_one_ends(
    front: Front, right: dict[str, list[int]], config: Settings
) -> None:
    """Each replica is replaced, under streams that end whole and requests that their own adapters answer."""
    assert {each["capacity"] for each in stats(front)} == {16}
    streams = Streams(front.url)
    with asking(front.url, right, 2) as faults:
        _deploy(config, engines(config.model_copy(update={"max_num_seqs": 32}))._bound_deployment)  # noqa: SLF001
    assert [(name, ids == right[name], errors) for name, ids, errors in streams.ended()] == [
        (name, True, []) for name in NAMES
    ]
    assert faults == []
    assert {each["capacity"] for each in stats(front)} == {32}


def test_a_killed_replica_ends_its_streams_with_an_error(
    front: Front, right: dict[str, list[int]], adapters: list[Path]
) -> None:
    """And no others; none has an answer that is not its own. What had no answer yet is answered by the other one.

    What it was judging is judged by who comes after it.
    """
    judging = a_gate_judges(front, adapters)
    num_had = requests_had(front)
    wholes, streams = Wholes(front.url), Streams(front.url)
    while requests_had(front) < num_had + 2 * NUM_ADAPTERS:
        pass
    assert len(actors("swaplora-base#Engine#")) == 2
    (victim,) = actors(f"swaplora-base#Engine#{judging.replica}")
    ray.kill(victim)
    assert [(name, by, ids[:LONG]) for name, by, ids in wholes.ended()] == [(name, name, right[name]) for name in NAMES]
    assert sum(values(front, "swaplora_retried_requests_total")) >= 1
    ended = streams.ended()
    lost = [(name, ids) for name, ids, errors in ended if errors]
    assert {code for _, _, errors in ended for code in errors} == {"engine_failed"}
    assert 0 < len(lost) < NUM_ADAPTERS
    for name, ids, errors in ended:
        assert ids == right[name] if not errors else ids == right[name][: len(ids)] and len(ids) < LONG
    for name in NAMES:
        answer = front.client.post("/v1/chat/completions", json=chat(name, ignore_eos=True, return_token_ids=True))
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == right[name][:8]
    front.wait_for(2)
    while (versions := front.client.get("/v1/adapters/gated/gate").json()["versions"])[-1]["standing"] == "candidate":
        time.sleep(0.1)
    assert versions[-1]["standing"] == "passed"
    assert front.client.get("/v1/adapters/gated").json()["version"] == 2
    assert front.client.get(f"/v1/evaluations/{judging.evaluation}").json()["state"] == "interrupted"


def requests_had(front: Front) -> float:
    """How many have found their adapter, of all there were, by all replicas."""
    return sum(values(front, r'swaplora_adapter_(hits|misses)_total{.*adapter="s\d"'))


class Wholes:
    """A request for a whole answer of each adapter, which is longer than any stream."""

    def __init__(self, url: str) -> None:
        self._pool = ThreadPoolExecutor(NUM_ADAPTERS)
        self._results = [self._pool.submit(self._one, url, name) for name in NAMES]

    def ended(self) -> list[tuple[str, str, list[int]]]:
        """Of each the adapter that was asked, the one that answered, and its token ids."""
        with self._pool:
            return [result.result() for result in self._results]

    def _one(self, url: str, name: str) -> tuple[str, str, list[int]]:
        body = chat(name, max_tokens=480, ignore_eos=True, return_token_ids=True)
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        by = answer.headers["x-swaplora-adapter"].removesuffix("@1")
        return name, by, answer.json()["choices"][0]["token_ids"]


class Judging(NamedTuple):
    replica: str
    evaluation: str


def a_gate_judges(front: Front, adapters: list[Path]) -> Judging:
    """A new version of an adapter, by a replica that has not done with it."""
    put(front, "gated", adapters[0])
    task = [{"prompt": f"{number}", "answer": "x"} for number in range(100)]
    gate = {"task": task, "min_score": 0, "max_tokens": 32}
    assert front.client.put("/v1/adapters/gated/gate", json=gate).status_code == 200
    put(front, "gated", adapters[1])
    while True:
        for answer in front.of_each("GET", "/v1/evaluations"):
            for told in json.loads(answer.body)["data"]:
                if told["gate"] == "gated" and told["ended"] is None:
                    return Judging(answer.replica, told["id"])
        time.sleep(0.05)


def put(front: Front, name: str, adapter: Path) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = dict(zip(("config", "weights"), ((adapter / each).read_bytes() for each in names), strict=True))
    answer = front.client.put(f"/v1/adapters/{name}", files=files)
    assert answer.status_code in (200, 201, 202), answer.text


def _deploy(config: Settings, deployment: Any) -> None:
    """Have the replicas as `deployment` says, with the arguments that it was made with."""
    again = deployment.bind(*deployment.init_args, **deployment.init_kwargs)
    serve.run(again, name=application_of(config), route_prefix=None)


def _abandoned(front: Front) -> float:
    """How many requests ended because their client went, of both replicas."""
    return sum(values(front, 'swaplora_generations_total{.*outcome="abandoned"'))


def values(front: Front, series: str) -> list[float]:
    """Of each replica's."""
    lines = front.client.get("/metrics").text.splitlines()
    return [float(line.split()[-1]) for line in lines if re.match(series, line)]
