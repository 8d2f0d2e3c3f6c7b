"""Work that a request has begun ends when its client goes, and costs nobody else anything until then."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from held_derivations import GUARD_SECONDS, HeldDerivations, hold_derivations
from serving import Running, serving, settings
from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.sources import resolver
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.store.staging import Staging

PATIENCE_SECONDS = 120
SCALED = [{"name": "a0", "scale": 2}]


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HeldDerivations:
    return hold_derivations(tmp_path / "hanging", monkeypatch)


@pytest.fixture
def stocked(base: Path, adapters: list[Path], tmp_path: Path) -> Iterator[Running]:
    """A server with four adapters, no two alike."""
    with serving(settings(base, tmp_path / "data")) as running:
        for number, folder in enumerate(adapters[:4]):
            assert running.put(f"a{number}", folder).status_code == 201
        yield running


@contextmanager
def asking(server: Running, method: str, path: str, body: Any = None) -> Iterator[None]:
    """A request whose client hangs up when the block ends."""
    address, content = urlsplit(server.url), b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def noted(calls: list[tuple[str, object]], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def note(*arguments: Any) -> Any:
        calls.append((name, arguments[0]))
        return method(*arguments)

    return note


def is_at_rest(server: Running) -> bool:
    return not any((server.service.settings.data_dir / "staging").iterdir())


def test_a_merge_ends_with_its_client_and_nothing_is_published(stocked: Running, hanging: HeldDerivations) -> None:
    with asking(stocked, "POST", "/v1/merged", {"name": "new", "from": SCALED}):
        hanging.wait_for_begun(1)
        with asking(stocked, "POST", "/v1/merged", {"name": "later", "from": SCALED}):
            time.sleep(0.1)  # whether it waits already or has not come yet: it must not be made
    hanging.wait_for_end()
    wait_until(lambda: is_at_rest(stocked), "files of an abandoned merge are left")
    hanging.let_go()
    answer = stocked.client.post("/v1/merged", json={"name": "newest", "from": SCALED}, timeout=GUARD_SECONDS)
    assert answer.status_code == 201
    names = [card["name"] for card in stocked.client.get("/v1/adapters").json()["data"]]
    assert "newest" in names
    assert not {"new", "later"} & set(names)
    assert hanging.num_begun == 2


def test_inspections_are_bounded_and_hold_up_no_merge(
    stocked: Running, hanging: HeldDerivations, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging.let_go("compose")
    monkeypatch.setattr(stocked.service.derivations.counts, "most", 2)
    inspect = "/v1/adapters/a{}/inspect?intruders=true"
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(stocked.client.get, inspect.format(n), timeout=GUARD_SECONDS) for n in range(2)]
        wait_until(lambda: stocked.service.derivations.counts.num_jobs == 2, "the inspections have not come")
        refused = stocked.client.get(inspect.format(2))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert "retry-after" in refused.headers
        assert stocked.client.get("/v1/adapters/a3/inspect").status_code == 200
        merged = stocked.client.post("/v1/merged", json={"name": "new", "from": SCALED}, timeout=GUARD_SECONDS)
        assert merged.status_code == 201
        hanging.let_go()
        assert {answer.result(GUARD_SECONDS).status_code for answer in answers} == {200}


def test_abandoned_inspections_are_dropped(stocked: Running, hanging: HeldDerivations) -> None:
    derivations = stocked.service.derivations
    with asking(stocked, "GET", "/v1/adapters/a0/inspect?intruders=true"):
        hanging.wait_for_begun(1)
        with asking(stocked, "GET", "/v1/adapters/a1/inspect?intruders=true"):
            wait_until(lambda: derivations.counts.num_jobs == 2, "the second has not come")
        wait_until(lambda: derivations.counts.num_jobs == 1, "the second waits on")
    hanging.wait_for_end()
    wait_until(lambda: not derivations.counts.num_jobs and is_at_rest(stocked), "the first is counted still")
    assert hanging.num_begun == 1


def test_equal_inspections_share_one_run_that_lasts_as_long_as_one_waits(
    stocked: Running, hanging: HeldDerivations, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/v1/adapters/a0/inspect?intruders=true"
    calls: list[tuple[str, object]] = []

    def of_shared() -> list[str]:
        shared = [cancellation for name, cancellation in calls if name == "join"]
        return [name for name, cancellation in calls if cancellation in shared]

    for name in ("join", "leave"):
        monkeypatch.setattr(Cancellation, name, noted(calls, name, getattr(Cancellation, name)))
    with ThreadPoolExecutor(2) as pool:
        with asking(stocked, "GET", path):
            hanging.wait_for_begun(1)
            answers = [pool.submit(stocked.client.get, path, timeout=GUARD_SECONDS) for _ in range(2)]
            wait_until(lambda: of_shared() == ["join", "join"], "the others have not come")
        wait_until(lambda: of_shared() == ["join", "join", "leave"], "the first is waited for still")
        hanging.let_go()
        first, second = (answer.result(GUARD_SECONDS) for answer in answers)
    assert first.status_code == 200
    assert first.json()["modules"] == second.json()["modules"]
    assert "intruders" in first.json()["modules"][0]
    assert hanging.num_begun == 1


def test_a_fetch_ends_with_its_client(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate, fetch = threading.Semaphore(0), threading.Event(), Sources.fetch
    cancellations: list[Cancellation] = []
    ended: list[str] = []

    def held(sources: Sources, uri: str, staging: Staging, *, cancellation: Cancellation, **options: Any) -> str:
        cancellations.append(cancellation)
        begun.release()
        assert gate.wait(GUARD_SECONDS)
        try:
            return fetch(sources, uri, staging, cancellation=cancellation, **options)
        finally:
            ended.append(uri)

    folder = adapters[0].parent
    with serving(settings(base, tmp_path / "data", adapter_dir=folder, adapter_rescan_seconds=86_400)) as server:
        monkeypatch.setattr(Sources, "fetch", held)
        with asking(server, "PUT", "/v1/adapters/left", {"source": f"file:{adapters[1].name}"}):
            assert begun.acquire(timeout=GUARD_SECONDS)
        wait_until(lambda: cancellations[0].is_cancelled, "the client has not gone")
        gate.set()
        wait_until(lambda: len(ended) == 1, "the fetch has not ended")
        answer = server.client.put("/v1/adapters/kept", json={"source": f"file:{adapters[1].name}"})
        assert answer.status_code == 201
        assert server.client.get("/v1/adapters/left").status_code == 404
        assert is_at_rest(server)


def test_too_many_names_to_look_for_are_429(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "MAX_LOOKS_OF_ONE", 0)
    (tmp_path / "folder").mkdir()
    with serving(settings(base, tmp_path / "data", adapter_dir=tmp_path / "folder")) as server:
        answer = server.generate("made-up", [1, 2, 3])
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    assert "retry-after" in answer.headers
