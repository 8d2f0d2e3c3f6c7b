"""Adapters that come without an upload: found in a folder at start, by being asked for, and when they change there."""

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tiny
from serving import Running, serving, settings
from swaplora_adapters.registry.names import Names

PROMPT = list(range(30, 50))


@pytest.fixture
def folder(adapters: list[Path], tmp_path: Path) -> Path:
    """An adapter folder with `first` in it."""
    copy(adapters[1], tmp_path / "folder" / "first")
    return tmp_path / "folder"


@pytest.fixture
def watching(base: Path, folder: Path, tmp_path: Path) -> Iterator[Running]:
    """A server that looks into the folder again and again."""
    fields = {"adapter_dir": folder, "adapter_rescan_seconds": 0.05}
    with serving(settings(base, tmp_path / "data", **fields)) as running:
        yield running


def copy(adapter: Path, target: Path) -> None:
    """As a careful operator does it: whole, then moved into place."""
    hidden = target.parent.parent / f"{target.name}.part"
    shutil.copytree(adapter, hidden)
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(exist_ok=True)
    hidden.rename(target)


def names(server: Running) -> list[str]:
    return [card["name"] for card in server.client.get("/v1/adapters").json()["data"]]


def version(server: Running, name: str) -> int:
    number: int = server.client.get(f"/v1/adapters/{name}").json().get("version", 0)
    return number


def wait_version(server: Running, name: str, wanted: int) -> None:
    deadline = time.monotonic() + 30
    while version(server, name) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_new_or_changed_in_the_folder_is_served(watching: Running, folder: Path, adapters: list[Path]) -> None:
    assert names(watching) == ["first"]
    assert watching.client.get("/v1/adapters/first").json()["source"] == "file:first"
    copy(adapters[2], folder / "second")
    wait_version(watching, "second", 1)
    before = watching.token_ids("first", PROMPT)
    copy(adapters[3], folder / "first")
    wait_version(watching, "first", 2)
    assert watching.token_ids("first", PROMPT) != before == watching.token_ids("first@1", PROMPT)
    shutil.rmtree(folder / "first")
    time.sleep(0.2)
    assert version(watching, "first") == 2  # what was taken in does not depend on the folder any more


def test_an_adapter_is_found_when_it_is_first_asked_for(
    base: Path, folder: Path, adapters: list[Path], tmp_path: Path
) -> None:
    with serving(settings(base, tmp_path / "data", adapter_dir=folder, adapter_rescan_seconds=0)) as server:
        copy(adapters[2], folder / "late")
        assert names(server) == ["first"]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.generate("late", PROMPT), range(8)))
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["x-swaplora-adapter"] for answer in answers} == {"late@1"}
        for name in ("nobody", "..", "late/..", "first@2"):
            assert server.generate(name, PROMPT).status_code == 404
        copy(adapters[2], folder / "numbered")
        assert server.generate("numbered@1", PROMPT).status_code == 200


def test_a_name_counts_as_used_only_when_it_can_be_found(
    base: Path, folder: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else who asks in between is told that there is no such adapter, as if it had been deleted."""
    refresh, before = Names._refresh, []  # noqa: SLF001 - the moment in between shows nowhere else

    def noted(self: Names, name: str) -> None:
        before.append((name, self.was_used(name)))
        refresh(self, name)

    with serving(settings(base, tmp_path / "data", adapter_dir=folder, adapter_rescan_seconds=0)) as server:
        monkeypatch.setattr(Names, "_refresh", noted)
        copy(adapters[2], folder / "late")
        assert server.generate("late", PROMPT).status_code == 200
        assert before == [("late", False)]


def test_what_was_deleted_does_not_come_back_by_itself(
    base: Path, folder: Path, adapters: list[Path], tmp_path: Path
) -> None:
    fields = {"adapter_dir": folder, "adapter_rescan_seconds": 0.05}
    with serving(settings(base, tmp_path / "data", **fields)) as server:
        assert server.client.delete("/v1/adapters/first").status_code == 200
        time.sleep(0.2)
        assert server.generate("first", PROMPT).status_code == 404
    with serving(settings(base, tmp_path / "data", **fields)) as server:
        assert server.generate("first", PROMPT).status_code == 404
        copy(adapters[4], folder / "first")
        wait_version(server, "first", 2)


def test_an_unchanged_folder_does_not_undo_an_upload_or_a_roll_back(
    base: Path, folder: Path, adapters: list[Path], tmp_path: Path
) -> None:
    with serving(settings(base, tmp_path / "data", adapter_dir=folder)) as server:
        for adapter in adapters[2:4]:
            server.put("first", adapter)
        server.client.patch("/v1/adapters/first", json={"current": 2})
    with serving(settings(base, tmp_path / "data", adapter_dir=folder)) as server:
        assert version(server, "first") == 2


def test_what_cannot_be_served_in_the_folder_hurts_nobody(
    watching: Running, folder: Path, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    bad = tiny.save_adapter(tmp_path / "bad", base, seed=5)
    tiny.edit_config(bad, use_dora=True)
    copy(bad, folder / "bad")
    (folder / "cut").mkdir()
    shutil.copy(adapters[0] / "adapter_config.json", folder / "cut")
    os.mkfifo(folder / "cut" / "adapter_model.safetensors")
    (folder / "empty").mkdir()
    (folder / ".hidden").mkdir()
    shutil.copy(adapters[0] / "adapter_config.json", folder / ".hidden")
    copy(adapters[2], folder / "good")
    wait_version(watching, "good", 1)
    assert names(watching) == ["first", "good"]
    answer = watching.generate("bad", PROMPT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_failed")
    assert "lora_magnitude_vector" in answer.json()["error"]["message"]
    assert watching.generate("empty", PROMPT).status_code == 404
    copy(adapters[5], folder / "bad")
    wait_version(watching, "bad", 1)
    watching.token_ids("bad", PROMPT)


def test_a_put_can_name_a_sub_folder(watching: Running, folder: Path, adapters: list[Path]) -> None:
    shutil.copytree(adapters[2], folder / "team" / "nested")
    answer = watching.client.put("/v1/adapters/chosen", json={"source": "file:team/nested"})
    assert (answer.status_code, answer.json()["source"]) == (201, "file:team/nested")
    again = watching.client.put("/v1/adapters/chosen", json={"source": "file:team/nested"})
    assert (again.status_code, again.json()["version"]) == (200, 1)
    created = watching.client.put("/v1/adapters/chosen", json={"source": "file:first"}, headers={"If-None-Match": "*"})
    assert created.status_code == 412


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("file:../elsewhere", 400, "source_not_allowed"),
        ("file:/etc", 400, "source_not_allowed"),
        ("file:first/../../elsewhere", 400, "source_not_allowed"),
        ("file:nobody", 404, "source_not_found"),
        ("hf://org/repo", 400, "source_not_allowed"),
        ("s3://bucket/prefix", 400, "source_not_allowed"),
        ("https://example.org/adapter", 400, "source_not_allowed"),
        ("", 400, "invalid_request"),
        ("x" * 2000, 400, "invalid_request"),
    ],
)
def test_a_source_that_the_operator_did_not_enable_is_refused(
    watching: Running, source: str, status: int, code: str
) -> None:
    answer = watching.client.put("/v1/adapters/chosen", json={"source": source})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert str(watching.service.settings.adapter_dir) not in answer.text
    assert watching.client.get("/v1/adapters/chosen").status_code == 404
    assert not list((watching.service.settings.data_dir / "staging").iterdir())


def test_a_put_with_json_that_says_more_is_refused(watching: Running) -> None:
    bodies: list[object] = [{"source": "file:first", "revision": "x"}, {}, [], "file:first"]
    for body in bodies:
        answer = watching.client.put("/v1/adapters/chosen", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
