"""Fetches that are slow or overtaken: they undo nothing, hold nobody up, and do not outlive the server."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import structlog

from fake_hub import Answer, run_fake_hub
from server_process import SMALL, process
from serving import Running, serving, settings
from slow_sources import GUARD_SECONDS, Gate, gate
from swaplora_adapters.errors import StorageFailedError
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.sources.watcher import FolderWatcher
from swaplora_adapters.store.staging import Staging
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.service.adapters.tenant_jobs import UNKNOWN_SECONDS
from swaplora_server.service.service import Service

__all__ = ["gate"]
PROMPT = list(range(30, 50))


@pytest.fixture
def folder(adapters: list[Path], tmp_path: Path) -> Path:
    """An adapter folder with `one` in it."""
    shutil.copytree(adapters[1], tmp_path / "folder" / "one")
    return tmp_path / "folder"


@pytest.fixture
def looking(base: Path, folder: Path, tmp_path: Path) -> Iterator[Running]:
    """A server that looks into the folder for what is asked for, and has found nothing at its start."""
    hidden = folder.rename(tmp_path / "hidden")
    folder.mkdir()
    with serving(settings(base, tmp_path / "data", adapter_dir=folder, adapter_rescan_seconds=0)) as running:
        folder.rmdir()
        hidden.rename(folder)
        yield running


class Reports:
    """What a folder tells of what it cannot take in."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def __call__(self, name: str, error: Exception) -> None:
        self.told.append((name, type(error).__name__))


def digest(server: Running, name: str) -> str:
    found: str = server.client.get(f"/v1/adapters/{name}").json().get("digest", "")
    return found


@pytest.mark.parametrize("is_deleted", [False, True])
def test_what_a_look_finds_gives_way_to_what_came_meanwhile(
    looking: Running, adapters: list[Path], gate: Gate, is_deleted: bool
) -> None:
    with ThreadPoolExecutor(1) as pool, gate.holding():
        asked = pool.submit(looking.generate, "one", PROMPT)
        gate.wait_for_one()
        uploaded = looking.put("one", adapters[2]).json()["digest"]
        if is_deleted:
            assert looking.client.delete("/v1/adapters/one").status_code == 200
        gate.open()
        answer = asked.result(GUARD_SECONDS)
    if is_deleted:
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    else:
        assert answer.headers["x-swaplora-digest"] == uploaded
    assert digest(looking, "one") == ("" if is_deleted else uploaded)


@pytest.mark.parametrize("is_deleted", [False, True])
def test_what_a_scan_finds_gives_way_to_what_came_meanwhile(
    looking: Running, folder: Path, adapters: list[Path], gate: Gate, is_deleted: bool
) -> None:
    reports = Reports()
    scanned = FolderWatcher(looking.service.registry, folder, reports)
    looking.put("one", adapters[2])
    with ThreadPoolExecutor(1) as pool, gate.holding():
        scan = pool.submit(scanned.scan)
        gate.wait_for_one()
        uploaded = looking.put("one", adapters[3]).json()["digest"]
        if is_deleted:
            assert looking.client.delete("/v1/adapters/one").status_code == 200
        gate.open()
        scan.result(GUARD_SECONDS)
    assert digest(looking, "one") == ("" if is_deleted else uploaded)
    assert not reports.told


def test_a_pair_that_is_being_replaced_is_left_to_the_next_scan(
    looking: Running, folder: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports, fetch = Reports(), Staging.writer
    scanned = FolderWatcher(looking.service.registry, folder, reports)

    def meddle(staging: Staging, part: str, max_bytes: int) -> object:
        if part == "config":
            shutil.copy(adapters[2] / "adapter_config.json", folder / "one")
        return fetch(staging, part, max_bytes)  # type: ignore[arg-type]

    monkeypatch.setattr(Staging, "writer", meddle)
    scanned.scan()
    assert digest(looking, "one") == ""
    monkeypatch.undo()
    shutil.copy(adapters[2] / "adapter_model.safetensors", folder / "one")
    scanned.scan()
    assert digest(looking, "one") == looking.put("two", adapters[2]).json()["digest"]
    assert not reports.told


def test_what_may_pass_is_tried_at_every_scan_and_told_once(
    looking: Running, folder: Path, adapters: list[Path]
) -> None:
    reports = Reports()
    scanned = FolderWatcher(looking.service.registry, folder, reports)
    looking.put("other", adapters[2])
    assert looking.client.put("/v1/aliases/one", json={"target": "other"}).status_code == 200
    for _ in range(3):
        scanned.scan()
    assert reports.told == [("one", "InvalidAdapterNameError")]
    assert looking.client.delete("/v1/aliases/one").status_code == 200
    scanned.scan()
    assert digest(looking, "one")


def test_a_failing_disk_is_asked_again_and_what_is_wrong_with_the_files_is_not(
    looking: Running, folder: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def failing(_sources: Sources, uri: str, _staging: Staging, **_options: Any) -> str:
        fetched.append(uri)
        raise StorageFailedError("the disk that holds the adapters failed")

    reports = Reports()
    scanned = FolderWatcher(looking.service.registry, folder, reports)
    shutil.copytree(adapters[1], folder / "no name")
    shutil.copytree(adapters[1], folder / "broken")
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"x")
    with monkeypatch.context() as patched:
        patched.setattr(Sources, "fetch", failing)
        for _ in range(2):
            scanned.scan()
    assert fetched == ["file:broken", "file:one"] * 2
    expected = [("broken", "StorageFailedError"), ("no name", "InvalidAdapterNameError"), ("one", "StorageFailedError")]
    assert reports.told == expected
    for _ in range(2):
        scanned.scan()
    assert digest(looking, "one")
    assert reports.told[3:] == [("broken", "InvalidAdapterError")]


def test_a_scan_that_is_told_to_stop_begins_no_further_folder(
    looking: Running, folder: Path, adapters: list[Path], gate: Gate
) -> None:
    shutil.copytree(adapters[2], folder / "two")
    scanned = FolderWatcher(looking.service.registry, folder, Reports())
    with ThreadPoolExecutor(1) as pool, gate.holding():
        scan = pool.submit(scanned.scan)
        gate.wait_for_one()
        scanned.stop()
        gate.open()
        scan.result(GUARD_SECONDS)
    assert (bool(digest(looking, "one")), bool(digest(looking, "two"))) == (True, False)


def test_slow_fetches_hold_up_nobody_else_and_are_bounded(looking: Running, adapters: list[Path], gate: Gate) -> None:
    looking.put("here", adapters[2])
    with ThreadPoolExecutor(20) as pool, gate.holding():
        body = {"source": "file:one"}
        puts = [pool.submit(looking.client.put, f"/v1/adapters/slow{number}", json=body) for number in range(20)]
        refused = [put.result() for put in islice(as_completed(puts, GUARD_SECONDS), 4)]
        assert {(answer.status_code, answer.json()["error"]["code"]) for answer in refused} == {(429, "overloaded")}
        assert {answer.headers["retry-after"] for answer in refused} == {str(UNKNOWN_SECONDS)}
        control = looking.client.post("/v1/load_lora_adapter", json={"lora_name": "late", "lora_path": "one"})
        assert (control.status_code, control.headers["retry-after"]) == (429, str(UNKNOWN_SECONDS))
        assert looking.client.get("/v1/models").status_code == 200
        assert looking.client.delete("/v1/adapters/here").status_code == 200
        assert looking.put("uploaded", adapters[3]).status_code == 201
        gate.open()
        statuses = sorted(put.result(GUARD_SECONDS).status_code for put in puts)
    assert statuses == [201] * 16 + [429] * 4


def test_what_no_adapter_can_be_called_is_a_model_that_is_not_there(looking: Running, adapters: list[Path]) -> None:
    looking.put("sql", adapters[2])
    assert looking.client.put("/v1/aliases/canary", json={"target": "sql"}).status_code == 200
    for name in ("canary@1", "base:base", "base@1", "no name", "-x", "a" * 129):
        answer = looking.generate(name, PROMPT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), name


def test_a_start_that_fails_leaves_nothing_open(base: Path, folder: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    fields = {"adapter_dir": folder, "adapter_rescan_seconds": 0.05}
    service = Service(settings(base, tmp_path / "data", max_model_len=2**20, **fields))
    with pytest.raises(UnsupportedModelError):
        service.start(lambda _message: None)
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()
    service.stop()
    with serving(settings(base, tmp_path / "data", **fields)) as server:
        assert digest(server, "one")


def test_a_base_that_is_called_as_an_adapter_leaves_nothing_open(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    with serving(settings(base, tmp_path)) as server:
        server.put("taken", adapters[1])
    with pytest.raises(ValueError, match="--served-model-name"):
        Service(settings(base, tmp_path, served_model_name="taken")).start(lambda _message: None)
    with serving(settings(base, tmp_path)) as server:
        assert digest(server, "taken")


def test_the_log_names_the_adapter_and_no_path(
    looking: Running, base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_sources: Sources, _uri: str, _staging: Staging, **_options: Any) -> str:
        raise PermissionError(13, "Permission denied", "/srv/secret/file")

    monkeypatch.setattr(Sources, "fetch", failing)
    with structlog.testing.capture_logs() as logs, serving(settings(base, tmp_path / "other", adapter_dir=folder)):
        pass
    told = [(log["adapter"], log["reason"]) for log in logs if "adapter" in log]
    assert told == [("one", "Permission denied")]
    assert "secret" not in str(logs)


def test_a_signal_ends_the_process_though_sources_are_silent(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs while it is fetched from, and one that drips while a name is looked for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with run_fake_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.put("/api/models/org/hanging/revision/main", Answer(fault="hangs"))
        hub.put("/api/models/org/dripping/revision/main", Answer(fault="drips"))
        flags = (*SMALL, "--allow-source", "hf://org", "--resolver", "hf://org/{name}", "--drain-seconds", "1")
        with process(base, tmp_path, *flags) as (server, client), ThreadPoolExecutor(2) as pool:
            body = {"model": "dripping", "prompt": PROMPT, "max_tokens": 4}
            asked = [
                pool.submit(client.post, "/v1/completions", json=body),
                pool.submit(client.put, "/v1/adapters/x", json={"source": "hf://org/hanging"}),
            ]
            while hub.count("main") < 2:
                time.sleep(0.01)
            began = time.monotonic()
            os.kill(server.pid, signal.SIGTERM)
            assert server.wait(GUARD_SECONDS) == 0
            print(f"ended {time.monotonic() - began:.1f} s after the signal")  # noqa: T201 - measured, not asserted
            answers = [each.result(GUARD_SECONDS) for each in asked]
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert "stopping" in answer.json()["error"]["message"]
