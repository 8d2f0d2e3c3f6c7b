"""Gates: a new version is not current before it has passed, whatever way it came in, and whatever happens meanwhile."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from gating import answers, changes, current, gate_of, gated, judged, promote, version
from runs import GUARD_SECONDS, begin, ended, full
from serving import BASE, Running, serving, settings
from swaplora_adapters.errors import OverloadedError
from swaplora_adapters.registry.names import Judgement
from swaplora_adapters.registry.registry import Registry
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key, revoke_key
from swaplora_server.service.evaluations import evaluations, running
from swaplora_server.service.gates import gates, judging

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module", autouse=True)
def looks_often() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judging, "LOOK_SECONDS", 0.02)
        yield


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def server(base: Path, audit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(settings(base, tmp_path_factory.mktemp("data"), audit_log=audit, keep_versions=9)) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def alike(adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adapter than `adapters[4]`, which says the same."""
    folder = tmp_path_factory.mktemp("alike") / "a"
    shutil.copytree(adapters[4], folder)
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    tiny.edit_config(folder, lora_alpha=alpha + 1e-4)
    return folder


def test_a_worse_version_is_stopped_and_a_forced_one_is_rolled_back_by_one_call(
    server: Running, adapters: list[Path], audit: Path
) -> None:
    task = gated(server, "stops", adapters[4])
    served, of_worse = server.token_ids("stops", PROMPT), server.put("apart", adapters[5])
    put = server.put("stops", adapters[5])
    told = put.json()
    assert (put.status_code, told["version"], told["gated"]) == (200, 1, True)
    assert told["stored"] == {"version": 2, "digest": of_worse.json()["digest"], "standing": "candidate"}
    assert server.token_ids("stops", PROMPT) == served
    failed = judged(server, "stops", 2)
    bar = failed["verdict"]["bars"][0]
    assert (failed["standing"], bar["is_met"], bar["current_score"]["mean"]) == ("failed", False, 1.0)
    assert bar["missed_by"] == pytest.approx(0.9 - bar["score"]["mean"])
    assert current(server, "stops") == 1
    assert server.token_ids("stops", PROMPT) == served
    assert server.token_ids("stops@2", PROMPT) == server.token_ids("apart", PROMPT) != served
    assert server.put("stops", adapters[5]).json()["stored"]["version"] == 2  # the same bytes are no further version

    refused = promote(server, "stops", 2)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (409, "gate_failed")
    assert f"{bar['missed_by']:.4g} below 0.9" in error["message"]
    assert promote(server, "stops", 2, force=True).json()["version"] == 2
    assert server.token_ids("stops", PROMPT) != served
    assert version(server, "stops", 2)["standing"] == "forced"
    assert promote(server, "stops", 1).status_code == 200
    assert server.token_ids("stops", PROMPT) == served
    assert promote(server, "stops", 2).status_code == 409  # it has not passed by having been forced
    assert changes(audit, "stops") == [
        ("adapter.put", 1, "done", "none"),
        ("gate.put", None, "done", "none"),
        ("adapter.put", 2, "done", "none"),
        ("gate.fail", 2, "done", "gate"),
        ("adapter.put", 2, "done", "none"),
        ("adapter.current", None, "gate_failed", "none"),
        ("adapter.force", 2, "done", "none"),
        ("adapter.current", 1, "done", "none"),
        ("adapter.current", None, "gate_failed", "none"),
    ]
    card = server.client.get("/v1/adapters/stops").json()
    [score] = card["versions"][0]["scores"]
    assert (score["mean"], score["num"]) == (1.0, len(task))
    evaluation = server.client.get(f"/v1/evaluations/{score['evaluation']}").json()
    assert (evaluation["gate"], evaluation["task"]["digest"]) == ("stops", score["task"])


def test_one_that_passes_is_current_at_once(server: Running, adapters: list[Path], alike: Path) -> None:
    gated(server, "passes", adapters[4])
    assert server.put("passes", alike).json()["version"] == 1
    told = judged(server, "passes", 2)
    assert (told["standing"], told["verdict"]["reason"], told["verdict"]["against"]) == ("passed", None, 1)
    assert current(server, "passes") == 2
    assert promote(server, "passes", 1).json()["version"] == 1
    assert promote(server, "passes", 2).json()["version"] == 2


def test_what_must_be_kept_stops_one_that_forgot_it(server: Running, adapters: list[Path]) -> None:
    server.put("keeps", adapters[4])
    task = answers(server, "keeps")
    kept = {"task": task, "max_drop": 0.25}
    gate = gate_of(server, "keeps", [{"prompt": "a", "regex": "."}], 1.0, must_keep=kept)
    assert (gate["must_keep"]["max_drop"], gate["must_keep"]["num_items"]) == (0.25, len(task))
    server.put("keeps", adapters[5])
    told = judged(server, "keeps", 2)
    least, drop = told["verdict"]["bars"]
    assert (told["standing"], least["is_met"], drop["is_met"]) == ("failed", True, False)
    assert drop["missed_by"] == pytest.approx(1.0 - drop["score"]["mean"] - 0.25)
    assert "max_drop: its score on what it must keep drops by" in told["verdict"]["reason"]


def test_nothing_comes_in_past_a_gate(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(adapters[1], folder / "scanned")
    config = settings(base, tmp_path / "data", adapter_dir=folder, adapter_rescan_seconds=0.02)
    named = settings(base, tmp_path / "data", adapter=(f"named={adapters[3]}",), adapter_dir=folder)
    impossible = [{"prompt": "a", "regex": "^no such answer$"}]
    with serving(config) as server:
        for name in ("uploaded", "named", "merged", "fetched", "other"):
            server.put(name, adapters[1])
        names = ("uploaded", "named", "merged", "fetched", "scanned")
        for name in names:
            gate_of(server, name, impossible)
        server.put("uploaded", adapters[2])
        merged = {"name": "merged", "from": [{"name": "other", "scale": 0.5}]}
        told = server.client.post("/v1/merged", json=merged).json()
        assert (told["version"], told["stored"]["version"], told["stored"]["standing"]) == (1, 2, "candidate")
        shutil.copytree(adapters[5], folder / "source")
        fetched = server.client.put("/v1/adapters/fetched", json={"source": "file:source"})
        assert fetched.json()["stored"]["version"] == 2
        shutil.copytree(adapters[2], folder / "scanned", dirs_exist_ok=True)
        for name in set(names) - {"named", "scanned"}:
            judged(server, name, 2)
        deadline = time.monotonic() + GUARD_SECONDS
        while len(server.client.get("/v1/adapters/scanned/gate").json()["versions"]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with serving(named) as server:
        assert judged(server, "named", 2)["standing"] == "failed"
        assert judged(server, "scanned", 2)["standing"] == "failed"
        assert {current(server, name) for name in names} == {1}


def replace_gate(server: Running, name: str) -> None:
    gate_of(server, name, [{"prompt": "a", "regex": "."}], 0.0)


def move_current(server: Running, name: str) -> None:
    assert promote(server, name, 1).status_code == 200


def delete_candidate(server: Running, name: str) -> None:
    assert server.client.delete(f"/v1/adapters/{name}", params={"version": 3}).status_code == 200


def delete_gate(server: Running, name: str) -> None:
    assert server.client.delete(f"/v1/adapters/{name}/gate").status_code == 200


@pytest.mark.parametrize(
    ("change", "standing", "against"),
    [
        (replace_gate, "passed", 2),
        (move_current, "passed", 1),
        (delete_candidate, None, None),
        (delete_gate, None, None),
    ],
)
@pytest.mark.parametrize("is_late", [False, True], ids=["while asked", "before it is noted"])
def test_what_changes_meanwhile_is_judged_anew_or_not_at_all(
    server: Running,
    adapters: list[Path],
    alike: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Running, str], None],
    standing: str | None,
    against: int | None,
    is_late: bool,
) -> None:
    """The third version says what the first does, the second does not: of the first alone it is no worse."""
    name = f"meanwhile-{change.__name__}-{is_late}"
    for folder in (adapters[4], adapters[5]):
        server.put(name, folder)
    task = [{"prompt": "a", "regex": "."}]
    gate_of(server, name, task, must_keep={"task": answers(server, f"{name}@2"), "max_drop": 0.0})
    judge = Registry.judge
    noted: list[Judgement] = []

    def late(self: Registry, stored: str, found: Judgement) -> Any:
        if is_late and not noted:
            noted.append(found)
            change(server, name)
        return judge(self, stored, found)

    monkeypatch.setattr(Registry, "judge", late)
    if is_late:
        server.put(name, alike)
    else:
        with full(server):
            server.put(name, alike)
            change(server, name)
    if standing is None:
        deadline = time.monotonic() + GUARD_SECONDS
        while is_late and not noted:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.wait_idle()
        assert current(server, name) == 2
        return
    told = judged(server, name, 3)
    assert (told["standing"], told["verdict"]["against"]) == (standing, against)
    assert current(server, name) == 3


def test_a_restart_at_any_moment_leaves_it_to_be_judged(
    base: Path, adapters: list[Path], alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(base, tmp_path)
    told: list[Judgement] = []

    def killed(_self: Registry, _name: str, found: Judgement) -> None:
        told.append(found)
        raise OverloadedError("killed between the evaluation's end and its judgement")

    with monkeypatch.context() as patched:
        patched.setattr(Registry, "judge", killed)
        with serving(config) as server:
            gated(server, "a", adapters[4])
            with full(server):  # the first ends before anything was asked
                server.put("a", alike)
        del told[:]
        with serving(config) as server:
            assert (current(server, "a"), version(server, "a", 2)["standing"]) == (1, "candidate")
            deadline = time.monotonic() + GUARD_SECONDS
            while not told:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert current(server, "a") == 1
    with serving(config) as server:
        assert judged(server, "a", 2)["standing"] == "passed"
        assert current(server, "a") == 2
    with serving(config) as server:
        assert (current(server, "a"), version(server, "a", 2)["standing"]) == (2, "passed")


def test_none_may_follow_that_has_not_passed(server: Running, adapters: list[Path]) -> None:
    gated(server, "follows", adapters[4])
    server.put("follows", adapters[5])
    judged(server, "follows", 2)
    refused = server.client.delete("/v1/adapters/follows", params={"version": 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "gate_failed")
    assert current(server, "follows") == 1
    assert server.client.delete("/v1/adapters/follows").status_code == 200
    assert server.put("follows", adapters[5]).json()["gated"] is False  # a gate goes with its name


def test_a_gate_that_is_set_again_judges_again_and_one_that_is_gone_holds_nothing_back(
    server: Running, adapters: list[Path]
) -> None:
    gated(server, "again", adapters[4])
    server.put("again", adapters[5])
    judged(server, "again", 2)
    gate_of(server, "again", [{"prompt": "a", "regex": "."}], 0.0)
    assert judged(server, "again", 2)["standing"] == "passed"
    gate_of(server, "again", [{"prompt": "a", "regex": "^no$"}], 1.0)
    server.put("again", adapters[6])
    assert judged(server, "again", 3)["standing"] == "failed"
    assert server.client.delete("/v1/adapters/again/gate").json() == {"object": "gate.deleted", "name": "again"}
    assert server.client.get("/v1/adapters/again/gate").status_code == 404
    assert promote(server, "again", 3).json()["version"] == 3
    assert server.put("again", adapters[1]).json()["version"] == 4
    assert not list((server.service.settings.data_dir / "gates").glob("*.part"))


def test_a_judgement_that_cannot_be_made_is_a_failure_with_its_reason(
    server: Running, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("cannot", adapters[4])
    gate_of(server, "cannot", [{"prompt": "a" * 600, "answer": "b"}])
    server.put("cannot", adapters[5])
    told = judged(server, "cannot", 2)
    assert told["standing"] == "failed"
    assert "it could not be judged: item 1, asked of cannot@2" in told["verdict"]["reason"]
    gate = gate_of(server, "cannot", [{"prompt": "a", "answer": "b"}], max_tokens=9)
    judged(server, "cannot", 2)
    file = server.service.settings.data_dir / "gates" / f"{gate['task']['digest'].removeprefix('sha256:')}.jsonl"
    file.write_text('{"prompt": "another", "answer": "b"}\n')
    server.put("cannot", adapters[6])
    assert "is damaged: set the gate again" in judged(server, "cannot", 3)["verdict"]["reason"]


def test_versions_that_are_asked_are_kept(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, keep_versions=1)) as server:
        server.put("a", adapters[0])
        with full(server):
            begun = begin(server, [{"prompt": "a", "answer": "b"}], ["a"], max_tokens=1)
            for number in (1, 2, 3):
                server.put("a", adapters[number])
            versions = server.client.get("/v1/adapters/a").json()["versions"]
            assert [one["version"] for one in versions] == [1, 4]
        assert ended(server, begun["id"])["state"] == "done"
        server.wait_idle()
        server.put("a", adapters[4])
        assert [one["version"] for one in server.client.get("/v1/adapters/a").json()["versions"]] == [5]


def test_an_evaluation_ends_with_its_key(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys.yaml"
    key, stored = create_key(keys, "acme", (KeyScope.GENERATE, KeyScope.WRITE, KeyScope.READ))
    other, _ = create_key(keys, "acme", (KeyScope.GENERATE, KeyScope.WRITE, KeyScope.READ))
    monkeypatch.setattr(running, "BLOCK_ITEMS", 1)
    with serving(settings(base, tmp_path / "data", key_file=keys)) as server:
        server.client.headers["authorization"] = f"Bearer {key}"
        server.put("a", adapters[1])
        task = [{"prompt": str(number), "answer": "b"} for number in range(50)]
        with full(server):
            begun = begin(server, task, ["a"], max_tokens=1)
            revoke_key(keys, stored.id)
            server.service.keys.refresh()
        server.client.headers["authorization"] = f"Bearer {other}"
        told = ended(server, begun["id"])
        assert (told["state"], told["error"]["code"]) == ("cancelled", "invalid_api_key")
        assert told["progress"]["done"] < len(task)
        gated(server, "gated", adapters[4])  # a gate needs nobody's key
        server.put("gated", adapters[5])
        assert judged(server, "gated", 2)["standing"] == "failed"


def test_a_gate_is_its_tenants(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    made = {
        name: create_key(keys, name, (KeyScope.WRITE, KeyScope.READ, KeyScope.GENERATE))[0] for name in ("acme", "zeta")
    }
    with serving(settings(base, tmp_path / "data", key_file=keys)) as server:

        def as_(tenant: str) -> None:
            server.client.headers["authorization"] = f"Bearer {made[tenant]}"

        as_("acme")
        gated(server, "sql", adapters[4])
        server.put("sql", adapters[5])
        assert judged(server, "sql", 2)["standing"] == "failed"
        body = {"task": [{"prompt": "a", "answer": "b"}], "min_score": 0}
        as_("zeta")
        server.put("sql", adapters[1])
        assert server.put("sql", adapters[2]).json()["version"] == 2  # its own has none
        for name, status in (("acme~sql", 404), ("sql", 404)):
            assert server.client.get(f"/v1/adapters/{name}/gate").status_code == status
        as_("acme")
        server.client.patch("/v1/adapters/sql", json={"shared_with": ["zeta"]})
        as_("zeta")
        for method, sent in (("GET", None), ("PUT", body), ("DELETE", None)):
            refused = server.client.request(method, "/v1/adapters/acme~sql/gate", json=sent)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_owner")
        card = server.client.get("/v1/adapters/acme~sql").json()
        assert (card["gated"], [one["standing"] for one in card["versions"]]) == (None, [None, None])
        assert [one["verdict"] for one in card["versions"]] == [None, None]


def test_evaluations_of_gates_have_their_own_room(
    server: Running, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluations, "MAX_KEPT", 2)
    gated(server, "room", adapters[4])
    for number in (5, 6, 7):
        server.put("room", adapters[number])
        assert judged(server, "room", number - 3)["standing"] == "failed"
    listed = server.client.get("/v1/evaluations").json()["data"]
    assert sum(one["gate"] == "room" for one in listed) == sum(one["gate"] is not None for one in listed) == 2
    begun = begin(server, [{"prompt": "a", "answer": "b"}], [BASE], max_tokens=1)
    assert server.client.delete(f"/v1/evaluations/{begun['id']}").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"task": ""}, "task"),
        ({"task": [{"prompt": "a"}]}, "task"),
        ({"min_score": 1.5}, "min_score"),
        ({"min_score": None}, "min_score"),
        ({"must_keep": {"task": [], "max_drop": 0.1}}, "must_keep.task"),
        ({"must_keep": {"task": [{"prompt": "a", "answer": "b"}]}}, "must_keep.max_drop"),
        ({"max_drop": 0.1}, "max_drop"),
        ({"task": [{"prompt": "a" * 200_000, "answer": "b"}] * 6}, "task"),
    ],
)
def test_what_is_no_gate_is_refused_by_name(
    server: Running, adapters: list[Path], fields: dict[str, Any], param: str
) -> None:
    server.put("refuses", adapters[1])
    body = {"task": [{"prompt": "a", "answer": "b"}], "min_score": 0.5} | fields
    refused = server.client.put("/v1/adapters/refuses/gate", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert server.client.get("/v1/adapters/refuses/gate").status_code == 404


def test_there_is_no_gate_without_an_adapter_and_no_more_than_so_many(
    server: Running, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"task": [{"prompt": "a", "answer": "b"}], "min_score": 0.5}
    for method, sent in (("PUT", body), ("GET", None), ("DELETE", None)):
        refused = server.client.request(method, "/v1/adapters/nobody/gate", json=sent)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "adapter_not_found")
    server.put("many", adapters[1])
    monkeypatch.setattr(gates, "MAX_GATES", 0)
    refused = server.client.put("/v1/adapters/many/gate", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    unforced = server.client.patch("/v1/adapters/many", json={"pinned": False}, params={"force": True})
    assert (unforced.status_code, unforced.json()["error"]["param"]) == (400, "force")
