"""What comes through the ingress is what the replica's application answers, to the byte; and the client's going too."""

import gzip
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fronts import Front, front_of
from serving import BASE, Running, serving, settings
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key
from swaplora_server.cluster.front.bodies import PART_BYTES
from swaplora_server.config import Settings
from swaplora_server.http.app import create_app
from swaplora_server.http.transport.body_memory import BodyMemory

_OWN = re.compile(rb'([a-z]+[-_])[0-9a-f]{32}|("(?:created|created_at|completed_at|last_used)":)[0-9.e+]+')
NEW = ("connection", "date", "x-request-id")
CHAT = {"model": "a0", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
TEXT = {"model": "a1", "prompt": "hello", "max_tokens": 6, "temperature": 0}


def config(base: Path, folder: Path, **fields: Any) -> Settings:
    return settings(base, folder, max_body_bytes=1 << 20, body_memory_bytes=4 << 20, prefix_cache=False, **fields)


@pytest.fixture(scope="module")
def one(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(config(base, tmp_path_factory.mktemp("data"))) as running:
        for number in range(2):
            assert running.put(f"a{number}", adapters[number]).status_code == 201
        yield running


@pytest.fixture(scope="module")
def front(one: Running) -> Iterator[Front]:
    app = create_app(one.service, BodyMemory(one.service.settings.body_memory_bytes))
    with front_of(one.service.settings, app) as found:
        yield found


def seen(client: httpx.Client, method: str, path: str, **request: Any) -> tuple[int, dict[str, str], bytes]:
    """An answer without what is new in each, and what says whether this connection goes on."""
    answer = client.request(method, path, **request)
    headers = {name: value for name, value in answer.headers.items() if name not in NEW}
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    return answer.status_code, headers, _OWN.sub(rb"\1\2", answer.content)


REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "completion": ("POST", "/v1/completions", {"json": TEXT}),
    "chat": ("POST", "/v1/chat/completions", {"json": CHAT}),
    "stream": ("POST", "/v1/chat/completions", {"json": {**CHAT, "stream": True}}),
    "messages": ("POST", "/v1/messages", {"json": {**CHAT, "stream": True}}),
    "responses": (
        "POST",
        "/v1/responses",
        {"json": {"model": "a0", "input": "hi", "max_output_tokens": 4, "temperature": 0, "stream": True}},
    ),
    "gzip": (
        "POST",
        "/v1/completions",
        {"content": gzip.compress(json.dumps(TEXT).encode()), "headers": {"content-encoding": "gzip"}},
    ),
    "no json": ("POST", "/v1/completions", {"content": b"{"}),
    "no body": ("POST", "/v1/completions", {}),
    "a form": ("POST", "/v1/completions", {"data": {"model": "a0"}}),
    "an unknown field": ("POST", "/v1/completions", {"json": {**TEXT, "beam_width": 3}}),
    "an unknown model": ("POST", "/v1/completions", {"json": {**TEXT, "model": "nobody"}}),
    "too large": ("POST", "/v1/completions", {"content": b" " * (5 << 20)}),
    "an unknown encoding": ("POST", "/v1/completions", {"content": b"x", "headers": {"content-encoding": "br"}}),
    "a bomb": (
        "POST",
        "/v1/completions",
        {"content": gzip.compress(b" " * (20 << 20)), "headers": {"content-encoding": "gzip"}},
    ),
    "no route": ("GET", "/nope", {}),
    "another method": ("PUT", "/v1/completions", {"json": TEXT}),
    "head": ("HEAD", "/v1/models", {}),
    "options": (
        "OPTIONS",
        "/v1/models",
        {"headers": {"origin": "http://localhost:3000", "access-control-request-method": "GET"}},
    ),
    "another page": ("POST", "/v1/completions", {"json": TEXT, "headers": {"origin": "https://evil.example"}}),
    "another host": ("GET", "/v1/models", {"headers": {"host": "evil.example"}}),
    "a page of here": ("GET", "/v1/models", {"headers": {"origin": "http://localhost:3000"}}),
    "models": ("GET", "/v1/models", {}),
    "a card": ("GET", "/v1/adapters/a0", {}),
    "no card": ("GET", "/v1/adapters/nobody", {}),
    "health": ("GET", "/health/ready", {}),
    "ping": ("GET", "/ping", {}),
    "evaluations": ("GET", "/v1/evaluations", {}),
    "a wrong page": ("GET", "/v1/evaluations?limit=0", {}),
    "no evaluation": ("POST", "/v1/evaluations/nobody/cancel", {}),
    "the page": ("GET", "/ui", {}),
    "openapi": ("GET", "/openapi.json", {}),
    "a mean id": ("GET", "/nope", {"headers": {"x-request-id": "a b\tc"}}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answer_is_that_of_one_machine(one: Running, front: Front, name: str) -> None:
    method, path, request = REQUESTS[name]
    assert seen(front.client, method, path, **request) == seen(one.client, method, path, **request)


def test_a_body_may_come_in_pieces(one: Running, front: Front) -> None:
    def pieces() -> Iterator[bytes]:
        yield from (bytes([each]) for each in json.dumps(TEXT).encode())

    path = "/v1/completions"
    assert seen(front.client, "POST", path, content=pieces()) == seen(one.client, "POST", path, content=pieces())


def test_an_id_of_the_client_is_in_its_answer(front: Front) -> None:
    answer = front.client.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]


def test_who_is_to_answer_is_told_to_the_router(front: Front) -> None:
    def keys(path: str, **body: Any) -> Any:
        front.engines.keys.clear()
        front.client.post(path, json=body)
        (key,) = front.engines.keys
        return key

    assert keys("/v1/completions", **TEXT).adapters == ("a1",)
    assert keys("/v1/completions", **{**TEXT, "model": "a1@1"}).adapters == ("a1@1",)
    assert keys("/v1/completions", **{**TEXT, "model": "base:a1"}).adapters == ("a1",)
    assert keys("/v1/completions", **{**TEXT, "model": BASE, "lora_path": "a0"}).adapters == ("a0",)
    mix = {**TEXT, "model": BASE, "adapters": [{"name": "a0"}, {"name": "a1", "scale": 0.5}]}
    assert keys("/v1/completions", **mix).adapters == ("a0", "a1")
    of_base = keys("/v1/chat/completions", **{**CHAT, "model": BASE})
    assert of_base.adapters == ()
    same = keys("/v1/chat/completions", **{**CHAT, "messages": [*CHAT["messages"], {"role": "user", "content": "x"}]})  # type: ignore[misc]
    assert of_base.session == same.session != ""
    assert keys("/v1/chat/completions", **{**CHAT, "cache_salt": "other"}).session != same.session
    assert keys("/v1/adapters/a1/warm").adapters == ("a1",)
    front.client.headers["X-Amzn-SageMaker-Adapter-Identifier"] = "a0"
    assert keys("/invocations", **{**TEXT, "model": BASE}).adapters == ("a0",)
    assert keys("/v1/completions", **{**TEXT, "model": BASE}).adapters == ()
    del front.client.headers["X-Amzn-SageMaker-Adapter-Identifier"]
    for wrong in (
        {},
        {"model": 3},
        {"model": ["a"]},
        {"model": "~"},
        {"model": "a1", "adapters": 3, "messages": [[3]]},
    ):
        assert isinstance(keys("/v1/completions", **wrong).adapters, tuple)


def test_whose_adapters_they_are_is_told_by_the_key(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """And of a body that comes without a good one nothing is read."""
    file = tmp_path / "keys.yaml"
    keys = {tenant: create_key(file, tenant, (KeyScope.ADMIN,), None)[0] for tenant in ("default", "acme")}
    own = config(base, tmp_path / "data", key_file=file, root_path="/models")
    with serving(own) as running, front_of(own, create_app(running.service, BodyMemory(1 << 20))) as front:

        def ask(path: str, key: str, model: str) -> httpx.Response:
            front.engines.keys.clear()
            headers = {"authorization": f"Bearer {key}"}
            return front.client.post(path, json={**TEXT, "model": model}, headers=headers)

        for path in ("/v1/completions", "/models/v1/completions"):
            for tenant, model, stored in (
                ("default", "sql", "sql"),
                ("acme", "sql", "acme~sql"),
                ("acme", "zeta~sql@3", "zeta~sql@3"),
                ("acme", "default~sql", "sql"),
            ):
                assert ask(path, keys[tenant], model).status_code == 404
                assert front.engines.keys[0].adapters == (stored,)
            front.engines.num_parts = 0
            assert ask(path, "nobody", "sql").status_code == 401
            assert (front.engines.keys[0].adapters, front.engines.num_parts) == ((), 0)
        running.client.headers["authorization"] = f"Bearer {keys['default']}"


def test_an_upload_comes_in_parts(one: Running, front: Front, adapters: list[Path]) -> None:
    """Never more than PART_BYTES of it at once, and only when it is read."""
    config_file, weights = (adapters[2] / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    before = front.engines.num_parts
    files = {"config": config_file.read_bytes(), "weights": weights.read_bytes()}
    answer = front.client.put("/v1/adapters/up", files=files)
    assert answer.status_code == 201, answer.text
    assert front.engines.num_parts > before
    assert one.token_ids("up", [1, 2, 3]) != one.token_ids(BASE, [1, 2, 3])
    before = front.engines.num_parts
    refused = front.client.put("/v1/adapters/up2", files={"config": b"{", "weights": b"x" * (3 * PART_BYTES)})
    assert refused.status_code == 422
    assert front.engines.num_parts - before >= 3
    assert one.client.delete("/v1/adapters/up").status_code in (200, 202)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/v1/responses"])
def test_a_lost_replica_ends_its_stream_with_an_error(one: Running, front: Front, path: str) -> None:
    body = {**CHAT, "max_tokens": 40, "stream": True, "prompt": "hi", "input": "hi"}
    fields = {"/v1/completions": ("prompt",), "/v1/messages": ("messages",), "/v1/responses": ("input",)}[path]
    own = {name: body[name] for name in ("model", "stream", "temperature", *fields)}
    own["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = 200
    front.engines.lost_after = 2  # the head and the first events: a few tokens later all may have been said
    try:
        answer = front.client.post(path, json=own)
    finally:
        front.engines.lost_after = None
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    told = json.loads(events[-2] if path == "/v1/completions" else events[-1])
    if path == "/v1/completions":
        assert events[-1] == "[DONE]"
        assert told["error"]["code"] == "engine_failed"
    elif path == "/v1/messages":
        assert told["type"] == "error"
    else:
        numbers = [json.loads(each)["sequence_number"] for each in events]
        assert numbers == list(range(len(events)))
        assert (told["type"], told["code"]) == ("error", "engine_failed")
    one.wait_idle()


def test_a_replica_lost_before_it_answers_is_told_by_status(front: Front) -> None:
    front.engines.lost_after = 0
    try:
        answer = front.client.post("/v1/completions", json=TEXT)
    finally:
        front.engines.lost_after = None
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "engine_failed"


def test_an_answer_that_is_cut_is_no_whole_one(front: Front) -> None:
    front.engines.lost_after = 1
    try:
        with pytest.raises(httpx.RemoteProtocolError):
            front.client.get("/openapi.json")
    finally:
        front.engines.lost_after = None


def test_a_clients_going_ends_its_request(one: Running, front: Front) -> None:
    body = {**CHAT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    aborted = _aborted(one)
    with front.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
        assert one.service.engine.snapshot().num_running == 1
    one.wait_idle()
    assert _aborted(one) == aborted + 1


def test_a_client_that_does_not_read_loses_its_stream(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """What it leaves unread is bounded, in front of the replica as on one machine."""
    own = config(base, tmp_path, max_unread_bytes=4096, max_model_len=512, max_connections=8)
    with serving(own) as running, front_of(own, create_app(running.service, BodyMemory(1 << 20))) as front:
        body = json.dumps({"model": BASE, "prompt": "hi", "max_tokens": 500, "n": 16, "stream": True, "logprobs": 5,
                           "ignore_eos": True}).encode()  # fmt: skip
        host, port = front.url.removeprefix("http://").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect((host, int(port)))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            while running.service.engine.snapshot().num_running == 0:
                time.sleep(0.01)
            running.wait_idle()
            assert _aborted(running) == 1


def _aborted(running: Running) -> float:
    """How many requests ended because their client went."""
    text = running.client.get("/metrics").text
    name = 'swaplora_generations_total{outcome="abandoned"}'
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))
