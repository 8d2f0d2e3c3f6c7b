"""The audit log: a line for each change that is asked for, of whom, made or failed."""

import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import BASE, Running, serving, settings
from swaplora_server.access.audit import AuditLog, AuditLogError
from swaplora_server.access.caller import ANYBODY, KeyScope
from swaplora_server.access.key_file import create_key
from swaplora_server.config import Settings
from swaplora_server.serve import StartError, run

SHOWN = ("key", "tenant", "change", "name", "version", "outcome")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audited(base: Path, tmp_path: Path, file: Path) -> Iterator[Running]:
    keys = tmp_path / "keys.yaml"
    key, _ = create_key(keys, "acme", tuple(KeyScope))
    with serving(settings(base, tmp_path / "data", key_file=keys, audit_log=file)) as server:
        server.client.headers["authorization"] = f"Bearer {key}"
        yield server


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(log: AuditLog, name: str) -> None:
    log.write(ANYBODY, "r", "adapter.put", name, 1, "sha256:ab", "done")


def test_each_change_is_noted_and_nothing_else(audited: Running, file: Path, adapters: list[Path]) -> None:
    client = audited.client
    put = audited.put("sql", adapters[1], **{"X-Request-Id": "trace-me"})
    client.put("/v1/adapters/sql", files={"config": b"{}", "weights": b"x"})
    client.put("/v1/adapters/sql", json={"source": "hf://org/repo"})
    client.patch("/v1/adapters/sql", json={"current": 1, "pinned": True})
    client.patch("/v1/adapters/sql", json={"pinned": False})
    client.patch("/v1/adapters/sql", json={"current": 1}, params={"force": True})  # which nothing held back
    client.put(f"/v1/aliases/{BASE}", json={"target": "sql"})
    client.put("/v1/aliases/prod", json={"target": "sql"})
    client.delete("/v1/adapters/sql")  # an alias leads there
    client.post("/v1/merged", json={"name": "two", "from": [{"name": "sql"}]})
    client.delete("/v1/aliases/prod")
    client.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
    client.delete("/v1/adapters/gone")
    for url in ("/v1/adapters", "/v1/adapters/two", "/v1/models"):
        client.get(url)
    client.delete("/v1/adapters/two", headers={"authorization": "Bearer wrong"})
    told = lines(file)
    key = told[0]["key"]
    assert [tuple(line[name] for name in SHOWN) for line in told] == [
        (key, "acme", "adapter.put", "sql", 1, "done"),
        (key, "acme", "adapter.put", "sql", None, "invalid_adapter"),
        (key, "acme", "adapter.fetch", "sql", None, "source_not_allowed"),
        (key, "acme", "adapter.current adapter.pin", "sql", 1, "done"),
        (key, "acme", "adapter.unpin", "sql", 1, "done"),
        (key, "acme", "adapter.current", "sql", 1, "done"),
        (key, "acme", "alias.put", BASE, None, "invalid_adapter_name"),
        (key, "acme", "alias.put", "prod", None, "done"),
        (key, "acme", "adapter.delete", "sql", None, "adapter_busy"),
        (key, "acme", "adapter.put", "two", 1, "done"),
        (key, "acme", "alias.delete", "prod", None, "done"),
        (key, "acme", "adapter.delete", "sql", 1, "done"),
        (key, "acme", "adapter.delete", "gone", None, "adapter_not_found"),
    ]
    assert (told[0]["digest"], told[0]["request"]) == (put.json()["digest"], "trace-me")
    assert told[11]["digest"] == put.json()["digest"]


def test_a_line_is_on_the_disk_before_the_change_is_answered(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda _descriptor: synced.append(file.stat().st_size))
    write(AuditLog(file), "sql")
    assert synced == [file.stat().st_size] != [0]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_lines_of_many_threads_stay_whole(file: Path) -> None:
    log = AuditLog(file)
    threads = [threading.Thread(target=write, args=(log, f"{number}" * 200)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line["name"] for line in lines(file)) == [f"{number}" * 200 for number in range(8)]


def test_a_name_ends_no_line_and_a_cut_line_spoils_no_other(file: Path) -> None:
    file.write_text('{"at": "20')
    log = AuditLog(file)
    write(log, 'a\n{"key": "forged"}\u2028\udc80' + "x" * 1000)
    file.rename(file.with_suffix(".1"))  # rotated
    write(log, "sql")
    assert [line["name"] for line in lines(file)] == ["sql"]
    _, whole = file.with_suffix(".1").read_text().splitlines()
    assert json.loads(whole)["name"].startswith("a\n")
    assert len(whole) < 2000


def test_what_cannot_be_noted_is_told_with_all_that_it_says(file: Path) -> None:
    complaints: list[str] = []
    log = AuditLog(file, complaints.append)
    file.unlink()
    file.mkdir()
    write(log, "sql")
    assert '"name": "sql"' in complaints[0]


def test_a_server_does_not_start_with_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(AuditLogError, match="cannot write the audit log"):
        AuditLog(tmp_path)
    with pytest.raises(StartError, match="cannot write the audit log"):
        run(Settings(audit_log=tmp_path / "none" / "audit.jsonl", data_dir=tmp_path))
