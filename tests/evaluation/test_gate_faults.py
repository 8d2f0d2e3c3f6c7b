"""Gates: what goes wrong on the way to a judgement is no judgement, and nobody is kept waiting by others for good."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gating import NUM_TOKENS, changes, current, gate_of, gated, judged, promote, version
from runs import GUARD_SECONDS, full
from serving import Running, serving, settings
from swaplora_adapters.errors import OverloadedError, StorageFullError
from swaplora_adapters.registry.index import Index, NamedVersions
from swaplora_adapters.registry.names import Judgement
from swaplora_adapters.registry.registry import Registry
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key, revoke_key
from swaplora_server.access.key_ring import KeyRing
from swaplora_server.service.errors import RequestError
from swaplora_server.service.evaluations import running
from swaplora_server.service.evaluations.asking import scores_of
from swaplora_server.service.gates import gates, judging

ANYTHING = [{"prompt": "a", "regex": "."}]
NOTHING = [{"prompt": "a", "regex": "^no such answer$"}]


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(judging, "AGAIN_SECONDS", 0.02)


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.yaml"


@pytest.fixture(scope="module")
def writes(keys: Path) -> str:
    return create_key(keys, "acme", (KeyScope.GENERATE, KeyScope.WRITE, KeyScope.READ))[0]


@pytest.fixture(scope="module")
def server(
    base: Path, audit: Path, keys: Path, writes: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    config = settings(base, tmp_path_factory.mktemp("data"), audit_log=audit, keep_versions=9, key_file=keys)
    with serving(config) as running_server:
        running_server.client.headers["authorization"] = f"Bearer {writes}"
        yield running_server


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + GUARD_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def asked_by(server: Running, name: str) -> list[dict[str, Any]]:
    listed = server.client.get("/v1/evaluations", params={"limit": 1000}).json()["data"]
    return [one for one in listed if one["gate"] == name]


def test_who_may_only_generate_ends_no_evaluation_of_a_gate_and_an_ended_one_is_no_verdict(
    server: Running, adapters: list[Path], keys: Path
) -> None:
    only, _ = create_key(keys, "acme", (KeyScope.GENERATE,))
    server.service.keys.refresh()
    server.put("vetoed", adapters[4])
    gate_of(server, "vetoed", ANYTHING, 0.0)
    with full(server):
        server.put("vetoed", adapters[5])
        until(lambda: asked_by(server, "vetoed"))
        path = f"/v1/evaluations/{asked_by(server, 'vetoed')[0]['id']}"
        for method, route in (("POST", f"{path}/cancel"), ("DELETE", path)):
            refused = server.client.request(method, route, headers={"authorization": f"Bearer {only}"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        assert server.client.post(f"{path}/cancel").json()["state"] == "cancelled"
        assert version(server, "vetoed", 2)["standing"] == "candidate"
        until(lambda: len(asked_by(server, "vetoed")) > 1)
    assert judged(server, "vetoed", 2)["standing"] == "passed"


@pytest.mark.parametrize("code", ["memory_full", "storage_failed", "internal_error"])
def test_what_passes_is_tried_again(
    server: Running, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    name = f"passing-{code}"
    failed: list[str] = []

    async def fails_once(*given: Any) -> list[float]:
        if not failed:
            failed.append(code)
            raise RuntimeError if code == "internal_error" else RequestError(code, "only now")
        return await scores_of(*given)

    monkeypatch.setattr(running, "scores_of", fails_once)
    server.put(name, adapters[4])
    gate_of(server, name, ANYTHING, 0.0)
    server.put(name, adapters[5])
    assert judged(server, name, 2)["standing"] == "passed"
    assert [one["error"] and one["error"]["code"] for one in asked_by(server, name)] == [None, code]


def test_beside_a_damaged_current_version_the_least_score_alone_counts(server: Running, adapters: list[Path]) -> None:
    digest = server.put("damaged", adapters[7]).json()["digest"]  # which no other test here has brought into memory
    gate_of(server, "damaged", ANYTHING, 1.0, must_keep={"task": NOTHING, "max_drop": 0.0})
    server.wait_idle()
    shutil.rmtree(server.service.settings.data_dir / "blobs" / digest.removeprefix("sha256:"))
    server.put("damaged", adapters[6])
    told = judged(server, "damaged", 2)
    assert (told["standing"], told["verdict"]["reason"]) == ("passed", None)
    assert "asked of damaged@1" in told["verdict"]["without_current"]
    [bar] = told["verdict"]["bars"]
    assert (bar["bar"], bar["score"]["mean"], bar["current_score"]) == ("min_score", 1.0, None)


def test_what_the_name_stands_for_put_again_wins_over_what_waits(server: Running, adapters: list[Path]) -> None:
    server.put("back", adapters[4])
    gate_of(server, "back", ANYTHING, 0.0)
    with full(server):
        server.put("back", adapters[5])
        put = server.put("back", adapters[4])
        assert (put.status_code, put.json()["stored"]["version"]) == (200, 1)
        told = version(server, "back", 2)
        assert (told["standing"], told["verdict"]["against"]) == ("failed", 1)
        assert told["verdict"]["reason"].startswith("put back: ")
        gate_of(server, "back", ANYTHING, 0.0)
        assert version(server, "back", 2)["standing"] == "failed"  # a gate that is set again revives none
        assert promote(server, "back", 2).status_code == 409
    server.wait_idle()
    assert current(server, "back") == 1
    assert server.put("back", adapters[5]).json()["stored"]["version"] == 3
    assert judged(server, "back", 3)["standing"] == "passed"


def test_no_name_waits_for_the_candidates_of_others(
    server: Running, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    async def never(_service: object, _caller: object, due: judging.Due) -> dict[str, Any]:
        turns.append(due.name)
        raise OverloadedError("not now")

    monkeypatch.setattr(judging, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(judging, "_verdict", never)
    for name in ("aa", "bb"):
        server.put(name, adapters[4])
        gate_of(server, name, ANYTHING, 0.0)
    with full(server):
        for name in ("aa", "bb"):
            server.put(name, adapters[5])
        until(lambda: "acme~bb" in turns)
        begun = turns.index("acme~bb")
        until(lambda: len(turns) >= begun + 6)
    assert turns[begun : begun + 6] == ["acme~bb", "acme~aa"] * 3
    for name in ("aa", "bb"):
        server.client.delete(f"/v1/adapters/{name}")


def test_a_promotion_is_in_the_audit_log_however_long_its_write_takes(
    server: Running, adapters: list[Path], audit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Registry.judge

    def slowly(self: Registry, name: str, found: Judgement) -> Any:
        card = judge(self, name, found)
        time.sleep(0.2)  # of the watch's looks some find it judged already
        return card

    monkeypatch.setattr(Registry, "judge", slowly)
    server.put("noted", adapters[4])
    gate_of(server, "noted", ANYTHING, 0.0)
    server.put("noted", adapters[5])
    until(lambda: current(server, "noted") == 2)
    until(lambda: changes(audit, "noted")[-1] == ("gate.pass", 2, "done", "gate"))


def test_a_full_disk_has_the_judgement_written_again_and_nothing_asked_again(
    server: Running, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, tries = Registry.judge, []

    def full_at_first(self: Registry, name: str, found: Judgement) -> Any:
        tries.append(found)
        if len(tries) < 4:
            raise StorageFullError("no room")
        return judge(self, name, found)

    monkeypatch.setattr(Registry, "judge", full_at_first)
    server.put("full", adapters[4])
    gate_of(server, "full", ANYTHING, 0.0)
    server.put("full", adapters[5])
    assert judged(server, "full", 2)["standing"] == "passed"
    assert (len(tries), len(asked_by(server, "full"))) == (4, 1)


def test_a_look_that_fails_is_not_the_last(
    server: Running, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gated_ones = Index.gated
    failed: list[Index] = []

    def fails_once(self: Index) -> list[NamedVersions]:
        if not failed:
            failed.append(self)
            raise RuntimeError("planted")
        return gated_ones(self)

    server.put("looked", adapters[4])
    gate_of(server, "looked", ANYTHING, 0.0)
    monkeypatch.setattr(Index, "gated", fails_once)
    until(lambda: failed)
    server.put("looked", adapters[5])
    assert judged(server, "looked", 2)["standing"] == "passed"


def test_what_was_current_without_a_gate_may_be_so_again(server: Running, adapters: list[Path]) -> None:
    gated(server, "served", adapters[4])
    server.put("served", adapters[5])
    assert judged(server, "served", 2)["standing"] == "failed"
    assert promote(server, "served", 2, force=True).status_code == 200
    assert server.client.delete("/v1/adapters/served/gate").status_code == 200
    assert version_of_card(server, "served", 2)["standing"] is None
    assert promote(server, "served", 1).status_code == 200
    gate_of(server, "served", NOTHING, 1.0)
    server.put("served", adapters[6])
    assert judged(server, "served", 3)["standing"] == "failed"
    assert promote(server, "served", 2).status_code == 200
    assert server.client.delete("/v1/adapters/served/gate").status_code == 200
    assert promote(server, "served", 3).status_code == 200
    gate_of(server, "served", NOTHING, 1.0)
    assert promote(server, "served", 1).status_code == 200
    assert promote(server, "served", 3).status_code == 200


def version_of_card(server: Running, name: str, number: int) -> dict[str, Any]:
    versions = server.client.get(f"/v1/adapters/{name}").json()["versions"]
    found: dict[str, Any] = next(one for one in versions if one["version"] == number)
    return found


def test_the_tasks_of_a_tenants_gates_have_a_bound_together(
    server: Running, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("wide", adapters[4])
    body = {"task": [{"prompt": "a", "answer": "b" * 9000}], "min_score": 0.5, "max_tokens": NUM_TOKENS}
    monkeypatch.setattr(gates, "MAX_TENANT_BYTES", 9000)
    refused = server.client.put("/v1/adapters/wide/gate", json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (429, "quota_exceeded")
    assert "bytes, and may have 9000" in error["message"]
    assert server.client.get("/v1/adapters/wide/gate").status_code == 404
    files = (server.service.settings.data_dir / "gates").iterdir()
    assert all(file.stat().st_size < 9000 for file in files)


def test_nobody_is_judged_for_whose_keys_are_all_gone(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, has_tenant = tmp_path / "keys.yaml", KeyRing.has_tenant
    turns: list[str] = []
    looks: list[bool] = []

    async def never(_service: object, _caller: object, due: judging.Due) -> dict[str, Any]:
        turns.append(due.name)
        raise OverloadedError("not now")

    def noted(self: KeyRing, tenant: str) -> bool:
        looks.append(has_tenant(self, tenant))
        return looks[-1]

    monkeypatch.setattr(judging, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(judging, "_verdict", never)
    monkeypatch.setattr(KeyRing, "has_tenant", noted)
    key, stored = create_key(keys, "acme", (KeyScope.GENERATE, KeyScope.WRITE, KeyScope.READ))
    create_key(keys, "zeta", (KeyScope.GENERATE,))
    with serving(settings(base, tmp_path / "data", key_file=keys)) as server:
        server.client.headers["authorization"] = f"Bearer {key}"
        server.put("a", adapters[4])
        gate_of(server, "a", ANYTHING, 0.0)
        server.put("a", adapters[5])
        until(lambda: turns)
        revoke_key(keys, stored.id)
        server.service.keys.refresh()
        until(lambda: not looks[-1])
        seen, had = len(looks), len(turns)
        until(lambda: len(looks) > seen + 5)
        assert len(turns) == had
