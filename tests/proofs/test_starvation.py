"""What one client sends or leaves behind costs the others neither the event loop, nor threads, nor memory."""

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from serving import BASE, Running, serving, settings
from swaplora_adapters.registry.card import PutResult
from swaplora_server.http.transport.body import MAX_SMALL_BODY_BYTES, SMALL_BYTES
from swaplora_server.service import prompts as tokenizing
from swaplora_server.service.adapters.derivations import MAX_INSPECTIONS
from swaplora_server.service.service import NUM_UPLOAD_THREADS

GUARD_SECONDS = 60
MANY = 40  # more than any number of processors gives the event loop's own pool
NUM_THREADS = 2
MAX_WAITING = 3
BODY_MEMORY = 200_000
LONG = "x" * 400


@pytest.fixture(scope="module")
def small(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with little of everything."""
    fields = {
        "tokenizer_threads": NUM_THREADS,
        "max_waiting": MAX_WAITING,
        "max_body_bytes": BODY_MEMORY // 2,
        "body_memory_bytes": BODY_MEMORY,
    }
    with serving(settings(base, tmp_path_factory.mktemp("data"), **fields)) as running:
        yield running


class HeldTokenizer:
    """The server's own tokenizer, which holds on to long texts until it is told to go on."""

    def __init__(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.may_go_on = threading.Event()
        self._real = server.service.base.tokenizer.backend_tokenizer
        monkeypatch.setattr(tokenizing, "LONG_CHARACTERS", len(LONG) - 1)
        monkeypatch.setattr(server.service.tokenizer, "_tokenizer", self)

    @property
    def backend_tokenizer(self) -> "HeldTokenizer":
        return self

    def encode_batch_fast(self, texts: Sequence[str], add_special_tokens: bool) -> Any:
        if held := [text for text in texts if len(text) >= len(LONG)]:
            self.begun += held
            assert self.may_go_on.wait(GUARD_SECONDS)
        return self._real.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


@pytest.fixture
def held(small: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldTokenizer]:
    tokenizer = HeldTokenizer(small, monkeypatch)
    yield tokenizer
    tokenizer.may_go_on.set()
    wait_for(lambda: small.service.offload.num_running == 0)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + GUARD_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Post:
    """A request whose client does what it likes. All are closed when the test is over."""

    opened: ClassVar[list["Post"]] = []

    def __init__(self, server: Running, path: str, body: bytes, num_sent: int | None = None) -> None:
        url = httpx.URL(server.url)
        self._socket = socket.create_connection((url.host, url.port), GUARD_SECONDS)
        self.opened.append(self)
        head = f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}"
        self._socket.sendall("\r\n".join([*head, "", ""]).encode() + body[:num_sent])
        self._rest = b"" if num_sent is None else body[num_sent:]

    def send_rest(self) -> None:
        self._socket.sendall(self._rest)

    def status(self) -> int:
        return int(self._socket.recv(65536).split()[1])

    def hang_up(self) -> None:
        self._socket.close()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while Post.opened:
        Post.opened.pop().hang_up()


def completion(server: Running, prompt: Any, **fields: Any) -> Post:
    return Post(server, "/v1/completions", json_of(prompt=prompt, **fields))


def json_of(**fields: Any) -> bytes:
    return json.dumps({"model": BASE, "max_tokens": 2} | fields).encode()


def fill_threads(server: Running, held: HeldTokenizer) -> list[Post]:
    posts = [completion(server, LONG) for _ in range(NUM_THREADS)]
    wait_for(lambda: len(held.begun) == NUM_THREADS)
    return posts


def fill_queue(server: Running) -> list[Post]:
    posts = [completion(server, LONG + "!") for _ in range(MAX_WAITING)]
    wait_for(lambda: server.service.offload.num_waiting == MAX_WAITING)
    return posts


@contextmanager
def set_at_end(event: threading.Event) -> Iterator[None]:
    """So that a test that fails does not wait for what it holds up."""
    try:
        yield
    finally:
        event.set()


def check_others_are_answered(server: Running) -> None:
    for path in ("/health", "/health/ready", "/metrics", "/v1/models", "/v1/adapters", "/v1/aliases", "/openapi.json"):
        assert server.client.get(path).status_code == 200
    assert server.client.put("/v1/aliases/y", json={"target": "x"}).status_code == 200
    assert server.client.patch("/v1/adapters/x", json={"pinned": False}).status_code == 200
    assert server.client.delete("/v1/aliases/y").status_code == 200
    assert server.client.delete("/v1/adapters/nobody").status_code == 404
    assert server.client.post("/v1/completions", content=json_of(prompt="short")).status_code == 200


@pytest.fixture
def named(small: Running, adapters: list[Path]) -> Iterator[str]:
    assert small.put("x", adapters[0]).status_code == 201
    yield "x"
    small.client.delete("/v1/adapters/x")


@pytest.mark.usefixtures("named")
def test_while_every_tokenizer_thread_is_busy_everything_else_is_answered(
    small: Running, held: HeldTokenizer, adapters: list[Path]
) -> None:
    posts = fill_threads(small, held) + fill_queue(small)
    check_others_are_answered(small)
    assert small.put("z", adapters[1]).status_code == 201
    assert small.client.get("/v1/adapters/x/inspect").status_code == 200
    assert small.client.delete("/v1/adapters/z").status_code == 200
    held.may_go_on.set()
    assert [post.status() for post in posts] == [200] * len(posts)


@pytest.mark.usefixtures("named")
def test_while_uploads_are_checked_everything_else_is_answered(
    small: Running, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, num_begun, may_go_on = small.service.registry.put, Counter[str](), threading.Event()

    def held_put(name: str, *arguments: Any, **fields: Any) -> PutResult:
        num_begun[name] += 1
        assert may_go_on.wait(GUARD_SECONDS)
        return put(name, *arguments, **fields)

    monkeypatch.setattr(small.service.registry, "put", held_put)
    with ThreadPoolExecutor(MANY) as clients, set_at_end(may_go_on):
        answers = [clients.submit(small.put, f"u{number}", adapters[0]) for number in range(MANY)]
        wait_for(lambda: num_begun.total() == NUM_UPLOAD_THREADS)
        check_others_are_answered(small)
        may_go_on.set()
        assert {answer.result().status_code for answer in answers} == {201}
    for number in range(MANY):
        small.client.delete(f"/v1/adapters/u{number}")


@pytest.mark.usefixtures("named")
def test_while_adapters_are_inspected_everything_else_is_answered(
    small: Running, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()

    def held_inspect(*_arguments: object) -> dict[str, Any]:
        assert may_go_on.wait(GUARD_SECONDS)
        return {"modules": [], "warnings": []}

    monkeypatch.setattr("swaplora_server.http.routes.inspection._inspect", held_inspect)
    with ThreadPoolExecutor(MANY) as clients, set_at_end(may_go_on):
        answers = [clients.submit(small.client.get, "/v1/adapters/x/inspect") for _ in range(MANY)]
        wait_for(lambda: sum(answer.done() for answer in answers) == MANY - MAX_INSPECTIONS)
        assert small.service.derivations.inspections.num_jobs == MAX_INSPECTIONS
        check_others_are_answered(small)
        assert small.put("z", adapters[1]).status_code == 201
        may_go_on.set()
        statuses = Counter(answer.result().status_code for answer in answers)
    assert statuses == {200: MAX_INSPECTIONS, 429: MANY - MAX_INSPECTIONS}
    small.client.delete("/v1/adapters/z")


def test_a_client_that_hangs_up_takes_its_waiting_work_with_it(small: Running, held: HeldTokenizer) -> None:
    posts = fill_threads(small, held)
    for post in fill_queue(small):
        post.hang_up()
    wait_for(lambda: small.service.offload.num_waiting == 0)
    held.may_go_on.set()
    assert [post.status() for post in posts] == [200] * len(posts)
    assert held.begun == [LONG] * NUM_THREADS


def test_a_conversation_is_dropped_with_its_client_too(small: Running, held: HeldTokenizer) -> None:
    fill_threads(small, held)
    body = json_of(messages=[{"role": "user", "content": LONG}])
    chat = Post(small, "/v1/chat/completions", body)
    wait_for(lambda: small.service.offload.num_waiting == 1)
    chat.hang_up()
    wait_for(lambda: small.service.offload.num_waiting == 0)


def test_when_the_queue_is_full_one_more_is_told_to_come_again(small: Running, held: HeldTokenizer) -> None:
    posts = fill_threads(small, held) + fill_queue(small)
    answer = small.client.post("/v1/completions", content=json_of(prompt=LONG))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    assert int(answer.headers["retry-after"]) > 0
    held.may_go_on.set()
    assert [post.status() for post in posts] == [200] * len(posts)


@pytest.mark.parametrize(("field", "param"), [("prompt", "prompt[1]"), ("messages", "messages")])
def test_a_prompt_that_cannot_fit_is_refused_untokenized(
    small: Running, held: HeldTokenizer, field: str, param: str
) -> None:
    text = "x" * (small.service.tokenizer.max_characters + 1)
    fields = {"prompt": ["a", text], "messages": [{"role": "user", "content": text}]}
    path = "/v1/completions" if field == "prompt" else "/v1/chat/completions"
    answer = small.client.post(path, content=json_of(**{field: fields[field]}))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert error["message"].startswith("This model's maximum context length is 512 tokens")
    assert held.begun == []


def test_bodies_are_bounded_together_from_their_first_byte_to_their_answer(small: Running) -> None:
    memory = small.bodies
    body = json_of(prompt="x", zzz="z" * (BODY_MEMORY // 2 - 1000))
    halves = [Post(small, "/v1/completions", body, num_sent=len(body) - 1) for _ in range(2)]
    wait_for(lambda: memory.used_bytes == 2 * (len(body) - 1))
    answer = small.client.post("/v1/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    assert int(answer.headers["retry-after"]) > 0
    assert small.client.post("/v1/completions", content=json_of(prompt="small")).status_code == 200
    halves[0].hang_up()
    wait_for(lambda: memory.used_bytes == len(body) - 1)
    assert small.client.post("/v1/completions", content=body).status_code == 200
    halves[1].send_rest()
    assert halves[1].status() == 200
    wait_for(lambda: memory.used_bytes == 0)


def test_a_body_is_counted_for_as_long_as_its_answer_is_written(small: Running) -> None:
    memory = small.bodies
    body = json_of(prompt="x", max_tokens=400, ignore_eos=True, stream=True)
    with small.client.stream("POST", "/v1/completions", content=body) as answer:
        assert answer.status_code == 200
        assert memory.used_bytes == len(body)
    wait_for(lambda: memory.used_bytes == 0)


def test_an_upload_is_not_held_in_memory(small: Running, adapters: list[Path]) -> None:
    assert (adapters[7] / "adapter_model.safetensors").stat().st_size > small.service.settings.max_body_bytes
    assert small.put("large", adapters[7]).status_code == 201
    assert small.bodies.used_bytes == 0
    small.client.delete("/v1/adapters/large")


def test_a_large_body_is_parsed_off_the_event_loop(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()

    def hold(_raw: object) -> None:
        has_begun.set()
        assert may_go_on.wait(GUARD_SECONDS)

    monkeypatch.setattr("swaplora_server.http.transport.body.check_limits", hold)
    post = completion(small, "x", zzz="z" * SMALL_BYTES)
    assert has_begun.wait(GUARD_SECONDS)
    assert small.client.get("/health").status_code == 200
    may_go_on.set()
    assert post.status() == 200


def test_a_body_that_only_manages_is_small(small: Running) -> None:
    body = json.dumps({"target": "x", "zzz": "z" * MAX_SMALL_BODY_BYTES}).encode()
    answer = small.client.put("/v1/aliases/y", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_that_is_announced_too_large_is_not_waited_for(small: Running) -> None:
    post = Post(small, "/v1/completions", b" " * (BODY_MEMORY // 2 + 1), num_sent=0)
    assert post.status() == 413


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["a" * 5000, "b" * 5000]}, "stop"),
        ({"stop": "a" * 10_000}, "stop"),
        ({"user": "u" * 1025}, "user"),
        ({"chat_template_kwargs": {f"k{number}": 1 for number in range(65)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"k": ["x" * 100] * 800}}, "chat_template_kwargs"),
    ],
)
def test_what_costs_each_token_or_each_message_is_bounded(small: Running, fields: dict[str, Any], param: str) -> None:
    body = json_of(messages=[{"role": "user", "content": "hi"}], **fields)
    answer = small.client.post("/v1/chat/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert answer.json()["error"]["param"].startswith(param)


async def test_many_clients_that_hang_up_leave_nothing_behind(small: Running) -> None:
    async def ask_and_leave(client: httpx.AsyncClient, seconds: float) -> None:
        with pytest.raises((TimeoutError, asyncio.CancelledError)):
            async with asyncio.timeout(seconds):
                await client.post("/v1/completions", content=json_of(prompt=LONG, max_tokens=100, ignore_eos=True, n=4))

    async with httpx.AsyncClient(base_url=small.url) as client:
        await asyncio.gather(*(ask_and_leave(client, number / 1000) for number in range(20)))
    await asyncio.to_thread(wait_for, lambda: small.bodies.used_bytes == 0)
    await asyncio.to_thread(small.wait_idle)
