"""A signal: nothing new is taken, what runs ends whole or with an error that says so, and the process ends in time."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from fake_hub import Answer, run_fake_hub
from server_process import SMALL, forked, starting
from serving import Running
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE

GUARD_SECONDS = 60
NUM_STREAMS = 50
HUB_CONFIG = "/org/base/resolve/main/config.json"
PROMPT = list(range(70, 90))
FOR_EVER = ("--stall-seconds", "600", "--adapter-wait-seconds", "600")  # nothing but the stop ends who waits


class Upload:
    """Of which the server has begun to read, and has half."""

    def __init__(self, client: httpx.Client, name: str, folder: Path) -> None:
        files = {"config": (folder / CONFIG_FILE).read_bytes(), "weights": (folder / WEIGHTS_FILE).read_bytes()}
        request = client.build_request("PUT", f"/v1/adapters/{name}", files=files)
        body, headers = request.read(), dict(request.headers) | {"expect": "100-continue"}
        self._connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port or 0, GUARD_SECONDS)
        self._connection.putrequest("PUT", f"/v1/adapters/{name}", skip_host=True)
        for header in headers.items():
            self._connection.putheader(*header)
        self._connection.endheaders()
        assert self._connection.sock.recv(1, socket.MSG_PEEK)  # that it may go on
        self._connection.send(body[:1000])
        self._rest = body[1000:]

    def send_rest(self) -> None:
        self._connection.send(self._rest)

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Its status and body, after which nothing comes."""
        with closing(self):
            response = self._connection.getresponse()
            return response.status, json.loads(response.read())

    def close(self) -> None:
        self._connection.close()


class Asking:
    """Clients at once, each on a thread of its own."""

    def __init__(self, client: httpx.Client, pool: ThreadPoolExecutor) -> None:
        self._client = client
        self._pool = pool

    def streams(self, num_streams: int, body: dict[str, Any]) -> list[Future[list[str]]]:
        """The lines of so many, all of which have begun."""
        begun = threading.Semaphore(0)
        streams = [self._pool.submit(self._read, body | {"stream": True}, begun.release) for _ in range(num_streams)]
        for _ in streams:
            assert begun.acquire(timeout=GUARD_SECONDS)
        return streams

    def answer(self, body: dict[str, Any]) -> Future[httpx.Response]:
        return self._pool.submit(self._client.post, "/v1/completions", json=body)

    def _read(self, body: dict[str, Any], begun: Callable[[], None]) -> list[str]:
        with self._client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            said = [next(lines)]
            begun()
            return said + [line for line in lines if line]


def room_for_one(*folders: Path) -> tuple[str, str]:
    sizes = [sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS_FILE).values()) for folder in folders]
    return "--adapter-memory-bytes", str(max(sizes))


def put_two(client: httpx.Client, held: Path, wanted: Path) -> None:
    """One that others run on, and one that waits for its room."""
    running = Running(str(client.base_url), None, client)  # type: ignore[arg-type]  # another process's
    for name, folder in (("held", held), ("wanted", wanted)):
        assert running.put(name, folder).status_code == 201


def until_waiting(client: httpx.Client) -> None:
    while client.get("/v1/adapters/wanted").json()["state"] != "loading":
        time.sleep(0.01)


def until_nothing_new_is_taken(url: httpx.URL) -> None:
    with suppress(httpx.TransportError), httpx.Client(base_url=url) as late:
        while late.get("/health/ready").status_code:
            time.sleep(0.01)


def test_all_end_whole_after_a_signal_and_a_second_waits_for_nobody(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    flags = (*SMALL, *FOR_EVER, "--drain-seconds", "600", *room_for_one(*adapters[:2]))
    with forked(base, tmp_path, *flags) as (server, client), ThreadPoolExecutor(NUM_STREAMS + 1) as pool:
        put_two(client, *adapters[:2])
        asking = Asking(client, pool)
        body = {"model": "held", "prompt": PROMPT, "max_tokens": 60, "ignore_eos": True}
        streams = asking.streams(NUM_STREAMS, body)
        loaded = asking.answer(body | {"model": "wanted"})
        until_waiting(client)
        whole, half = (Upload(client, name, adapters[0]) for name in ("whole", "half"))
        server.send_signal(signal.SIGTERM)
        until_nothing_new_is_taken(client.base_url)
        whole.send_rest()
        assert whole.answer()[0] == 201
        assert loaded.result(GUARD_SECONDS).json()["usage"]["completion_tokens"] == 60
        for stream in streams:
            said = stream.result(GUARD_SECONDS)
            assert said[-1] == "data: [DONE]"
            assert json.loads(said[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        with closing(half):
            assert server.poll() is None, "half an upload is waited for"
            server.send_signal(signal.SIGTERM)
            assert server.wait(GUARD_SECONDS) == 0


def test_what_outlives_the_time_to_drain_is_told_so(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    flags = (*SMALL, *FOR_EVER, "--drain-seconds", "0.2", *room_for_one(*adapters[:2]))
    with forked(base, tmp_path, *flags) as (server, client), ThreadPoolExecutor(NUM_STREAMS + 1) as pool:
        put_two(client, *adapters[:2])
        asking = Asking(client, pool)
        body = {"model": "held", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}
        streams = asking.streams(NUM_STREAMS, body)
        waiting = asking.answer(body | {"model": "wanted"})
        until_waiting(client)
        half = Upload(client, "half", adapters[0])
        server.send_signal(signal.SIGTERM)
        for stream in streams:
            *_, error, done = stream.result(GUARD_SECONDS)
            assert (json.loads(error.removeprefix("data: "))["error"]["code"], done) == ("draining", "data: [DONE]")
        answer = waiting.result(GUARD_SECONDS)
        for status, told in ((answer.status_code, answer.json()), half.answer()):
            assert (status, told["error"]["code"]) == (503, "draining")
        assert server.wait(GUARD_SECONDS) == 0


def test_what_hangs_with_the_shared_store_holds_up_no_end(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """A fetch, and a gate: who opens a pipe waits for somebody at its other end."""
    shared, data = tmp_path / "shared", tmp_path / "data"
    shared.mkdir()
    flags = (*SMALL, *FOR_EVER, "--drain-seconds", "0.2", "--shared-store", str(shared))
    with forked(base, data, *flags) as (server, client), ThreadPoolExecutor(2) as pool:
        put_two(client, *adapters[:2])
        gate = {"task": [{"prompt": "a", "answer": "b"}], "min_score": 0.5}
        assert client.put("/v1/adapters/held/gate", json=gate).status_code == 200
        for stored in (*shared.glob(f"*/blobs/*/*/{WEIGHTS_FILE}"), *shared.glob("*/tasks/*/*")):
            stored.unlink()
            os.mkfifo(stored)
        for copy in (*(data / "blobs").glob(f"*/{WEIGHTS_FILE}"), *(data / "gates").iterdir()):
            copy.unlink()
        fetched = Asking(client, pool).answer({"model": "wanted", "prompt": PROMPT})
        until_waiting(client)
        gate["task"] = [{"prompt": "c", "answer": "d"}]  # beside which the other's is counted
        waiting = pool.submit(client.put, "/v1/adapters/wanted/gate", json=gate)
        while not [*(data / "gates").glob("*.jsonl")]:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        assert server.wait(GUARD_SECONDS) == 0
        for answer in (fetched, waiting):
            assert isinstance(answer.exception(), httpx.TransportError) or answer.result().status_code == 503


def test_a_signal_ends_a_start_that_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a base which its hub does not send."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with run_fake_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.put(HUB_CONFIG, Answer(fault="hangs"))
        with starting("org/base", tmp_path) as (server, client):
            while not hub.count("config.json"):
                assert server.poll() is None
                time.sleep(0.01)
            assert client.get("/health").status_code == 200
            assert client.get("/health/ready").status_code == 503
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            assert server.wait(GUARD_SECONDS) == 0
            print(f"ended {time.monotonic() - began:.1f} s after the signal")  # noqa: T201 - measured, not asserted
