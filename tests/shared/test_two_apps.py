"""Two whole servers on one shared store: what one has acknowledged, the other answers with."""

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Semaphore
from typing import Any

import httpx
import pytest
from rich.console import Console

import tiny
from buckets import make_bucket
from gating import current, gated, judged, promote
from replicas import Disturbed
from serving import Running, serving, settings
from swaplora_adapters.errors import StorageFullError, StoreUnreachableError
from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.store.shared import store as shared_store
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.history import log as shared_log
from swaplora_server.access.caller import Caller
from swaplora_server.service.gates import judging
from swaplora_server.service.service import NUM_CHANGE_THREADS, NUM_UPLOAD_THREADS, SEEN_SECONDS, Service

FOLDER = pytest.mark.parametrize("kind", ["folder"], indirect=True)  # where what is stored makes no difference
PROMPT = [97, 31, 200, 5, 66, 142]
MAX_TOKENS = 6


@pytest.fixture(scope="module")
def disturbed() -> Iterator[list[Disturbed]]:
    """What the two servers have opened, in order."""
    opened: list[Disturbed] = []

    def disturb(address: str) -> Disturbed:
        opened.append(Disturbed(open_objects(address)))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_store, "open_objects", disturb)
        yield opened


@pytest.fixture(scope="module", params=["folder", "bucket"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def servers(
    kind: str, base: Path, disturbed: list[Disturbed], moto_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, Running]]:
    folder = tmp_path_factory.mktemp("servers")
    (folder / "shared").mkdir()
    disturbed.clear()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        address = str(folder / "shared") if kind == "folder" else make_bucket(moto_url, patch)
        one, other = (
            stack.enter_context(serving(settings(base, folder / name, shared_store=address)))
            for name in ("one", "other")
        )
        yield one, other


@pytest.fixture(autouse=True)
def at_peace(disturbed: list[Disturbed]) -> Iterator[None]:
    yield
    for each in disturbed:
        each.come_back()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no store that is away."""
    monkeypatch.setattr("swaplora_server.service.service.SEEN_SECONDS", 60.0)


def answer(server: Running, model: str) -> tuple[str, list[int]]:
    """The digest of who answered, and what."""
    response = server.generate(model, PROMPT, MAX_TOKENS)
    assert response.status_code == 200, response.text
    return response.headers["x-swaplora-digest"], response.json()["choices"][0]["token_ids"]


@pytest.mark.usefixtures("patient")
def test_an_upload_is_called_and_listed_at_once_on_the_other_server(
    servers: tuple[Running, Running], adapters: list[Path]
) -> None:
    one, other = servers
    for number in range(10):
        name = f"at-once-{number}"
        assert one.put(name, adapters[number % 6]).status_code == 201
        digest, said = answer(other, name)
        assert (digest, said) == answer(one, name)
        assert other.client.get(f"/v1/adapters/{name}").status_code == 200
        assert name in {card["name"] for card in one.client.get("/v1/adapters").json()["data"]}
        assert other.client.put(f"/v1/aliases/to-{name}", json={"target": name}).status_code in (200, 201)
        assert answer(one, f"to-{name}") == (digest, said)
        assert other.client.delete(f"/v1/aliases/to-{name}").status_code == 200
        assert other.client.delete(f"/v1/adapters/{name}").status_code in (200, 202)
        assert one.generate(name, PROMPT).status_code == 404


@pytest.mark.usefixtures("patient")
def test_a_rolling_replace_under_traffic_gives_no_old_and_no_mixed_answer(
    servers: tuple[Running, Running], adapters: list[Path]
) -> None:
    """Whoever asks after a replace was acknowledged, wherever that was, is answered by it or by a later one."""
    one, other = servers
    said: dict[str, list[int]] = {}
    for folder in adapters[:4]:
        one.put("alone", folder)
        digest, said[digest] = answer(other, "alone")
    assert len(set(map(tuple, said.values()))) == 4
    one.put("rolling", adapters[0])
    acknowledged, is_over = [1], threading.Event()
    answers: list[tuple[int, int, str, list[int]]] = []

    def ask(server: Running) -> None:
        with httpx.Client(base_url=server.url, timeout=600) as client:
            body = {"model": "rolling", "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0}
            while not is_over.is_set():
                least = acknowledged[-1]
                response = client.post("/v1/completions", json=body | {"return_token_ids": True})
                assert response.status_code == 200, response.text
                version = int(response.headers["x-swaplora-adapter"].removeprefix("rolling@"))
                ids = response.json()["choices"][0]["token_ids"]
                answers.append((least, version, response.headers["x-swaplora-digest"], ids))

    threads = [threading.Thread(target=ask, args=(server,)) for server in (one, other) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 25):
            response = (one, other)[number % 2].put("rolling", adapters[number % 4])
            acknowledged.append(response.json()["version"])
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert acknowledged == list(range(1, 26))
    assert len(answers) > 8
    for least, version, digest, ids in answers:
        assert version >= least
        assert ids == said[digest]
    Console().print(f"\n{len(answers)} answers beside 24 replaces")


@FOLDER
def test_a_server_that_is_slow_itself_gives_no_old_answer(
    servers: tuple[Running, Running], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the store answers: where something is held for longer than a store that is away is waited for."""
    one, other = servers
    one.put("late", adapters[0])
    answer(other, "late")
    changes = other.service.registry.names.changes
    monkeypatch.setattr("swaplora_server.service.service.BUSY_SECONDS", 60.0)
    has_begun, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with changes:
            has_begun.set()
            is_over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert has_begun.wait(60)
    digest = one.put("late", adapters[1]).json()["digest"]
    threading.Timer(2 * SEEN_SECONDS, is_over.set).start()
    assert answer(other, "late")[0] == digest
    thread.join()


@pytest.mark.usefixtures("patient")
def test_a_slow_store_makes_changes_and_requests_slow_and_nothing_else(
    servers: tuple[Running, Running], disturbed: list[Disturbed], adapters: list[Path]
) -> None:
    for each in disturbed:
        each.be_slow(0.1)
    for number in range(4):
        by, other = (servers, servers[::-1])[number % 2]
        digest = by.put("slow", adapters[number]).json()["digest"]
        assert answer(other, "slow")[0] == digest
    assert servers[0].client.delete("/v1/adapters/slow").status_code in (200, 202)
    assert servers[1].generate("slow", PROMPT).status_code == 404


def test_what_is_known_is_served_while_the_store_is_away_and_changes_are_told_to_come_again(
    servers: tuple[Running, Running], disturbed: list[Disturbed], adapters: list[Path]
) -> None:
    one, other = servers
    one.put("known", adapters[0])
    expected = answer(other, "known")
    disturbed[1].vanish()
    for _ in range(3):
        assert answer(other, "known") == expected
    unknown = other.generate("never-heard-of", PROMPT)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "store_unreachable")
    assert int(unknown.headers["retry-after"]) > 0
    assert other.client.get("/v1/adapters/never-heard-of").status_code == 503
    for refused in (
        other.put("refused", adapters[1]),
        other.client.delete("/v1/adapters/known"),
        other.client.put("/v1/aliases/best", json={"target": "known"}),
        other.client.patch("/v1/adapters/known", json={"pinned": True}),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unreachable"), refused.text
        assert int(refused.headers["retry-after"]) > 0
    later = one.put("known", adapters[2]).json()
    assert answer(other, "known")[0] != later["digest"]
    metrics = other.client.get("/metrics").text
    assert "swaplora_shared_store_unseen_requests_total 0.0" not in metrics
    disturbed[1].come_back()
    deadline = time.monotonic() + 60
    while other.client.get("/v1/adapters/known").json()["digest"] != later["digest"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert other.generate("never-heard-of", PROMPT).status_code == 404
    assert other.put("refused", adapters[1]).status_code == 201
    assert answer(one, "refused") == answer(other, "refused")


def test_a_store_that_hangs_holds_up_no_request_of_what_is_known(
    servers: tuple[Running, Running], disturbed: list[Disturbed], adapters: list[Path]
) -> None:
    one, other = servers
    one.put("cold", adapters[3])
    expected = answer(other, "cold")
    is_over = threading.Event()

    def hang(_call: str, _key: str) -> None:
        is_over.wait(60)

    disturbed[1].before = hang
    upload = threading.Thread(target=other.put, args=("hanging", adapters[4]))
    upload.start()
    try:
        for _ in range(3):
            assert answer(other, "cold") == expected
        assert not is_over.is_set()
    finally:
        is_over.set()
        upload.join()
    assert answer(one, "hanging") == answer(other, "hanging")


@FOLDER
def test_a_gate_that_one_server_was_told_of_is_judged_by_one_of_them(
    servers: tuple[Running, Running], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    whole = judging._verdict  # noqa: SLF001

    async def noted(service: Service, caller: Caller, due: judging.Due) -> dict[str, Any]:
        begun.append(due.name)
        return await whole(service, caller, due)

    monkeypatch.setattr(judging, "_verdict", noted)
    one, other = servers
    gated(one, "guarded", adapters[4])
    assert other.put("guarded", adapters[5]).json()["version"] == 1
    assert judged(other, "guarded", 2)["standing"] == "failed"
    assert judged(one, "guarded", 2)["standing"] == "failed"
    assert current(one, "guarded") == current(other, "guarded") == 1
    assert promote(one, "guarded", 2, force=True).json()["version"] == 2
    assert current(other, "guarded") == 2
    assert begun == ["guarded"]
    data_dir = other.service.settings.data_dir
    monkeypatch.setattr(judging, "_is_ours", lambda service, _due: service.settings.data_dir == data_dir)
    gated(one, "guarded-there", adapters[4])  # the task of which is to be had from the shared store
    one.put("guarded-there", adapters[5])
    assert judged(one, "guarded-there", 2)["verdict"]["bars"]
    for copy in (data_dir / "gates").iterdir():
        copy.write_bytes(b"")  # as a crash may leave it
    one.put("guarded-there", adapters[3])
    assert judged(one, "guarded-there", 3)["verdict"]["bars"]


@FOLDER
def test_while_the_store_hangs_lists_and_metrics_are_answered_however_many_changes_wait(
    servers: tuple[Running, Running], disturbed: list[Disturbed], adapters: list[Path]
) -> None:
    one, other = servers
    one.put("listed", adapters[3])
    answer(other, "listed")
    is_over = threading.Event()
    told: list[int] = []

    def hang(_call: str, _key: str) -> None:
        is_over.wait(60)

    def change(number: int) -> None:
        with httpx.Client(base_url=other.url, timeout=600) as client:
            told.append(client.put(f"/v1/aliases/hung-{number}", json={"target": "listed"}).status_code)

    disturbed[1].before = hang
    threads = [threading.Thread(target=change, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    try:
        for path in ("/v1/models", "/metrics", "/v1/adapters"):
            assert other.client.get(path, timeout=60).status_code == 200
        while len(told) < len(threads) - 1:
            time.sleep(0.05)
        assert not is_over.is_set()
        assert {*told} == {503}
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


@FOLDER
def test_what_hangs_with_the_store_is_waited_for_by_nobody_else(
    servers: tuple[Running, Running], disturbed: list[Disturbed], adapters: list[Path], base: Path, tmp_path: Path
) -> None:
    """Uploads and judges on all threads for them, and a gate; what comes then, or waits for a turn, is refused."""
    one, other = servers
    gated(one, "hung", adapters[3])  # the task of which the other does not have
    one.put("unguarded", adapters[0])
    answer(other, "unguarded")
    new = tiny.save_adapter(tmp_path / "new", base, seed=99, rank=3)
    is_over, put, told = threading.Event(), Semaphore(0), list[int]()

    def hang(call: str, _key: str) -> None:
        if call == "put":
            put.release()
        is_over.wait(60)

    def ask(method: str, path: str, **body: Any) -> None:
        with httpx.Client(base_url=other.url, timeout=60) as client:
            told.append(client.request(method, path, **body).status_code)

    def begun(*arguments: Any, **body: Any) -> threading.Thread:
        thread = threading.Thread(target=ask, args=arguments, kwargs=body)
        thread.start()
        return thread

    service = other.service
    gate = {"task": [{"prompt": "a", "answer": "b"}], "min_score": 0.5}
    disturbed[1].before = lambda call, key: hang(call, key) if call in ("put", "fetch") else None
    threads = [
        begun("PUT", f"/v1/adapters/new-{number}", files=files_of(new)) for number in range(NUM_UPLOAD_THREADS + 1)
    ]
    try:
        for _ in range(NUM_UPLOAD_THREADS):
            assert put.acquire(timeout=20)
        threads.append(begun("PUT", "/v1/adapters/unguarded/gate", json=gate))
        while not gate_waits(service):
            time.sleep(0.01)
        assert not told
        disturbed[1].before = hang
        while not told:  # the one that waited for its turn
            time.sleep(0.01)
        due = [judging.Due(f"t{number}~x", 2, "d", "g", 1) for number in range(NUM_CHANGE_THREADS)]
        for each in due:
            with pytest.raises(StoreUnreachableError):
                asyncio.run(service.change(partial(judging._is_ours, service, each)))  # noqa: SLF001
        ask("PUT", "/v1/adapters/late", files=files_of(new))
        ask("PUT", "/v1/adapters/unguarded/gate", json=gate)
        ask("DELETE", "/v1/adapters/hung/gate")
        ask("PUT", "/v1/aliases/late", json={"target": "unguarded"})
        assert told == [503] * 5
        assert not service.has_ended
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    return {"config": (folder / CONFIG_FILE).read_bytes(), "weights": (folder / WEIGHTS_FILE).read_bytes()}


def gate_waits(service: Service) -> bool:
    return service.gates._changes.locked()  # noqa: SLF001


@FOLDER
def test_a_server_with_another_base_is_refused_and_says_which(
    servers: tuple[Running, Running], base: Path, tmp_path: Path
) -> None:
    """Also one that calls it otherwise: an adapter of one server could be called as the base of another is."""
    address, one = servers[0].service.settings.shared_store, servers[0].service.base
    assert address is not None
    other = tiny.save_tiny_base(tmp_path / "other" / base.name, seed=1)
    for settings_of, said in (
        (settings(other, tmp_path / "data"), one.fingerprint.weights[:12]),
        (settings(base, tmp_path / "data", served_model_name="else"), f"this server's (else in {one.dtype}"),
        (settings(base, tmp_path / "data", dtype="bfloat16"), "in bfloat16"),
    ):
        with (
            pytest.raises(StoreError, match=re.escape(said.replace("torch.", ""))),
            serving(settings_of.model_copy(update={"shared_store": address})),
        ):
            pass
    assert not (tmp_path / "data" / "shared").exists()
    [said_at] = Path(address).glob("*/base.json")
    assert servers[0].service.settings.base_id in said_at.read_text()


@FOLDER
def test_a_server_whose_store_is_another_by_now_takes_no_requests(
    servers: tuple[Running, Running], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_log, "TRUST_SECONDS", -1.0)  # as ten seconds later
    one, other = servers
    one.put("changed", adapters[0])
    expected = answer(other, "changed")
    address = servers[0].service.settings.shared_store
    assert address is not None
    last = max(Path(address).glob("*/log/*"))
    last.rename(last.with_name("gone"))
    while other.client.get("/health/ready").status_code == 200:
        time.sleep(0.05)
    for refused in (
        other.generate("changed", PROMPT),
        other.put("changed", adapters[1]),
        other.client.get("/v1/models"),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_changed"), refused.text
    last.with_name("gone").rename(last)
    for server in servers:
        while server.client.get("/health/ready").status_code != 200:
            time.sleep(0.05)
        assert answer(server, "changed") == expected


@FOLDER
def test_a_server_that_cannot_take_over_what_others_change_is_not_ready(
    servers: tuple[Running, Running], adapters: list[Path]
) -> None:
    def full(*_arguments: object) -> None:
        raise StorageFullError("the disk is full (for a test)")

    one, other = servers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other.service.registry._store._names, "put", full)  # noqa: SLF001
        one.put("not-taken-over", adapters[2])
        while other.client.get("/health/ready").status_code == 200:
            time.sleep(0.05)
    while other.client.get("/health/ready").status_code != 200:
        time.sleep(0.05)
    assert answer(other, "not-taken-over") == answer(one, "not-taken-over")
