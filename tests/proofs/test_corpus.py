"""Every hostile upload gets the answer that it must get, beside good streams that never notice."""

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from corpus import CORPUS, MAX_ADAPTER_BYTES
from damage import Files, filled
from hostile import Hostile
from repository import ROOT
from serving import BASE, Running, serving, settings, stream_chat
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE

HANG_SECONDS = 600
PROMPT = list(range(30, 50))
STREAM_TOKENS = 60


class Answer(NamedTuple):
    """What came back on the wire; no status if the connection was closed without an answer."""

    status: int | None
    body: dict[str, Any]
    seconds: float

    @property
    def error(self) -> dict[str, str]:
        found: dict[str, str] = self.body.get("error", {})
        return found


@dataclass
class GoodStreams:
    """A greedy stream per model, begun again as soon as it ends, and what any of them said that was new."""

    url: str
    controls: dict[str, list[int]]
    is_over: threading.Event = field(default_factory=threading.Event)
    num_ended: int = 0
    complaints: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Return once `is_over` is set and every stream has ended."""
        async with httpx.AsyncClient(base_url=self.url, timeout=HANG_SECONDS) as client:
            await asyncio.gather(*(self._repeat(client, model) for model in self.controls))

    async def _repeat(self, client: httpx.AsyncClient, model: str) -> None:
        while True:
            try:
                said = await stream_chat(client, model, "go on", STREAM_TOKENS, ignore_eos=True)
            except (httpx.HTTPError, AssertionError) as error:
                self.complaints.append(f"{model} broke off: {error!r}")
                return
            self.num_ended += 1
            if not said.is_done or said.token_ids != self.controls[model]:
                self.complaints.append(f"{model} said {said.token_ids}")
            if self.is_over.is_set() or self.complaints:
                return


async def undisturbed(url: str, models: list[str]) -> dict[str, list[int]]:
    """What each model says alone; two runs must agree."""
    async with httpx.AsyncClient(base_url=url, timeout=HANG_SECONDS) as client:
        runs = [[await stream_chat(client, m, "go on", STREAM_TOKENS, ignore_eos=True) for m in models] for _ in "12"]
    first, second = ([said.token_ids for said in run] for run in runs)
    assert first == second
    return dict(zip(models, first, strict=True))


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that takes no adapter above 32 MiB."""
    config = settings(base, tmp_path_factory.mktemp("data"), max_adapter_bytes=MAX_ADAPTER_BYTES)
    with serving(config) as running:
        yield running


@pytest.fixture(scope="module")
def streams(server: Running, adapters: list[Path]) -> Iterator[GoodStreams]:
    """Eight streams, of the base and of seven adapters, that run from the first of these tests to the last."""
    models = [f"good{n}" for n in range(7)]
    for name, folder in zip(models, adapters, strict=False):
        assert server.put(name, folder).status_code == 201
    good = GoodStreams(server.url, asyncio.run(undisturbed(server.url, [BASE, *models])))
    thread = threading.Thread(target=lambda: asyncio.run(good.run()))
    thread.start()
    yield good
    good.is_over.set()
    thread.join()
    assert good.complaints == []
    assert good.num_ended >= len(good.controls)
    server.wait_idle()


@pytest.fixture(scope="module")
def sound(adapters: list[Path]) -> Files:
    """The adapter of rank 4 that the corpus spoils."""
    return Files((adapters[2] / CONFIG_FILE).read_bytes(), (adapters[2] / WEIGHTS_FILE).read_bytes())


@pytest.fixture(scope="module")
def slowest() -> Iterator[dict[str, float]]:
    """Seconds by case; the slowest are printed at the end."""
    seconds: dict[str, float] = {}
    yield seconds
    ranked = sorted(seconds, key=lambda name: -seconds[name])
    sys.stdout.write("\nslowest answers: " + ", ".join(f"{name} {seconds[name]:.2f} s" for name in ranked[:5]) + "\n")


def send(server: Running, case: Hostile, sound: Files) -> Answer:
    """Send the case's bytes as they are. Who must stay unanswered stops sending and waits to be hung up on."""
    url, wire = httpx.URL(server.url), case.wire(sound)
    started = time.perf_counter()
    with closing(socket.create_connection((url.host, url.port or 0), timeout=HANG_SECONDS)) as connection:
        connection.sendall(wire)
        if case.answer[0] is None:
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
            return Answer(None, {}, time.perf_counter() - started)
        response = http.client.HTTPResponse(connection)
        response.begin()
        is_json = response.headers.get_content_type() == "application/json"
        body = json.loads(response.read()) if is_json else {}
        return Answer(response.status, body, time.perf_counter() - started)


def adapter_names(server: Running) -> set[str]:
    return {card["name"] for card in server.client.get("/v1/adapters").json()["data"]}


def wait_empty(folder: Path) -> None:
    """Return once nothing is left in a folder; what a client that went away had sent is removed after it is gone."""
    deadline = time.monotonic() + HANG_SECONDS
    while any(folder.iterdir()):
        assert time.monotonic() < deadline, "an upload's files were left behind"
        time.sleep(0.01)


def try_and_delete(server: Running, name: str) -> None:
    """An adapter that was let in generates, or fails by name, and can be deleted."""
    answer = server.generate(name, PROMPT, 4)
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "adapter_failed"
    assert server.client.delete(f"/v1/adapters/{name}").status_code == 200


async def test_a_row_whose_output_is_not_finite_fails_alone(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """Eight times, in a cache so small that the blocks it leaves behind are used again by all others."""
    spoilt = filled(1e38)((adapters[2] / WEIGHTS_FILE).read_bytes())
    files = {"config": (adapters[2] / CONFIG_FILE).read_bytes(), "weights": spoilt}
    with serving(settings(base, tmp_path, kv_cache_bytes=160 << 10)) as server:
        assert server.client.put("/v1/adapters/huge", files=files).status_code == 201
        assert server.put("good", adapters[4]).status_code == 201
        models = [BASE, "good", BASE, "good"]
        control = [server.token_ids(model, PROMPT, 60) for model in models]
        assert control == [server.token_ids(model, PROMPT, 60) for model in models]
        for _ in range(8):
            failing = asyncio.to_thread(server.generate, "huge", list(range(200)), 20)
            rows = [asyncio.to_thread(server.token_ids, model, PROMPT, 60) for model in models]
            answer, found = await asyncio.gather(failing, asyncio.gather(*rows))
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_failed")
            assert found == control


def test_nothing_is_run_or_opened_but_the_files_themselves(sound: Files, tmp_path: Path) -> None:
    num_written = 0
    for case in CORPUS:
        if case.files is not None:
            folder = tmp_path / f"{num_written:03}"
            folder.mkdir()
            found = case.files(sound)
            (folder / CONFIG_FILE).write_bytes(found.config)
            (folder / WEIGHTS_FILE).write_bytes(found.weights)
            num_written += 1
    script = ROOT / "tools" / "audit.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=600, check=True
    )
    found_events = json.loads(finished.stdout)
    assert found_events["events"] == []
    assert 0 < found_events["accepted"] < num_written


@pytest.mark.parametrize("case", CORPUS, ids=[case.name for case in CORPUS])
def test_is_answered_as_it_must_be_and_leaves_nothing(
    case: Hostile, server: Running, streams: GoodStreams, sound: Files, slowest: dict[str, float]
) -> None:
    answer = send(server, case, sound)
    slowest[case.name] = answer.seconds
    assert (answer.status, answer.error.get("code")) == case.answer, answer.error
    assert case.word in answer.error.get("message", "")
    assert len(answer.error.get("message", "")) < 20_000
    assert str(server.service.settings.data_dir) not in json.dumps(answer.error)
    wait_empty(server.service.settings.data_dir / "staging")
    expected = streams.controls.keys() - {BASE} | ({case.adapter} if answer.status == 201 else set())
    assert adapter_names(server) == expected
    if answer.status == 201:
        try_and_delete(server, case.adapter)
    assert streams.complaints == []
    assert server.service.is_healthy


def test_the_corpus_is_as_large_as_it_claims_and_every_name_is_used_once() -> None:
    assert len({case.name for case in CORPUS}) == len(CORPUS) >= 100


def test_what_the_corpus_spoils_is_sound(server: Running, sound: Files) -> None:
    files = {"config": sound.config, "weights": sound.weights}
    assert server.client.put("/v1/adapters/sound", files=files).status_code == 201
    try_and_delete(server, "sound")
