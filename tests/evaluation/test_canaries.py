"""Canaries: a side of an alias that fails too often gets no more requests, and all who should know hear of it."""

import asyncio
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runs import GUARD_SECONDS
from serving import Running, serving, settings
from swaplora_adapters.registry.registry import Registry
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key
from swaplora_server.service.gates.canaries import Canaries, Trial, Window

PROMPT = [5, 6, 7]
CANARY = {"target": "sql@2", "max_error_rate": 0.5, "min_requests": 4, "window_seconds": 60.0}
SPLIT = [{"target": "sql@1", "weight": 1}, {"target": "sql@2", "weight": 999}]


@pytest.fixture(scope="module")
def server(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("data")
    key, _ = create_key(folder / "keys.yaml", "acme", (KeyScope.WRITE, KeyScope.READ, KeyScope.GENERATE))
    config = settings(
        base, folder / "data", key_file=folder / "keys.yaml", api_key=("own",), audit_log=folder / "audit.jsonl"
    )
    with serving(config) as running:
        running.client.headers["authorization"] = f"Bearer {key}"
        for number in (1, 2):
            assert running.put("sql", adapters[number]).is_success
        yield running


def put(server: Running, alias: str, **canary: Any) -> dict[str, Any]:
    answer = server.client.put(f"/v1/aliases/{alias}", json={"targets": SPLIT, "canary": CANARY | canary})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def stepped_back(server: Running, alias: str) -> dict[str, Any]:
    deadline = time.monotonic() + GUARD_SECONDS
    told: dict[str, Any]
    while (told := server.client.get(f"/v1/aliases/{alias}").json())["canary"]["stepped_back"] is None:
        assert time.monotonic() < deadline, told
        time.sleep(0.01)
    return told


def num_step_backs(server: Running) -> float:
    metrics = server.client.get("/metrics", headers={"authorization": "Bearer own"}).text
    found = re.search(r"^swaplora_canary_step_backs_total (\S+)$", metrics, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_one_that_cannot_be_loaded_steps_back_for_good(server: Running, adapters: list[Path]) -> None:
    server.put("broken", adapters[5])
    digest = server.client.get("/v1/adapters/broken").json()["digest"]
    server.client.post("/v1/adapters/broken/warm")
    before, config = num_step_backs(server), server.service.settings
    shutil.rmtree(config.data_dir / "blobs" / digest.removeprefix("sha256:"))
    server.service.registry._residency.drop(digest)  # noqa: SLF001 - as if others had needed the room
    split = [{"target": "sql", "weight": 1}, {"target": "broken@1", "weight": 999}]
    body: dict[str, Any] = {"targets": split, "canary": CANARY | {"target": "broken@1"}}
    told = server.client.put("/v1/aliases/live", json=body).json()
    assert told["canary"] == body["canary"] | {"stepped_back": None, "reason": None}
    failed = 0
    while failed < 4:
        answer = server.generate("live", PROMPT, 1, user=None)
        failed += answer.status_code == 409
    told = stepped_back(server, "live")
    assert told["targets"] == [{"target": "sql", "weight": 1}, {"target": "broken@1", "weight": 0}]
    assert told["canary"]["reason"] == "4 of 4 requests failed in 60 s"
    answers = [server.generate("live", PROMPT, 1, user=f"u{number}") for number in range(20)]
    assert {answer.headers["x-swaplora-adapter"] for answer in answers} == {"sql@2"}
    assert num_step_backs(server) == before + 1
    lines = [json.loads(line) for line in (config.audit_log or Path()).read_text().splitlines()]
    [line] = [line for line in lines if line["change"] == "alias.step_back"]
    assert (line["tenant"], line["key"], line["name"], line["version"]) == ("acme", "canary", "live", 1)
    assert server.client.delete("/v1/aliases/live").status_code == 200


def trial(server: Running, alias: str) -> Any:
    record = server.service.registry.names.index.resolve_name("acme~sql@2")
    return server.service.canaries.trial(f"acme~{alias}", "acme~sql", record)


def test_only_a_canarys_own_failures_count_and_enough_of_them(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server, "counts")
    canaries, index = server.service.canaries, server.service.registry.names.index
    assert canaries.trial("acme~counts", "acme~sql", index.resolve_name("acme~sql@1")) is None
    assert canaries.trial("counts", "acme~sql", index.resolve_name("acme~sql@2")) is None
    asked: list[str] = []
    monkeypatch.setattr(Registry, "step_back", lambda _self, _alias, _canary, reason: asked.append(reason))

    def tell(*errors: str | None, one: Any = None) -> None:
        one = one or trial(server, "counts")
        for error in errors:
            server.service.wakeups.post(partial(one, error))
        server.generate("counts", PROMPT, 1)  # behind all of them

    failed, old = "engine_failed", trial(server, "counts")
    tell(failed, "adapter_failed")
    assert not asked  # too few, and what was answered counts as well
    put(server, "counts")  # the same again: a canary of its own
    tell(failed)
    tell(failed, failed, failed, failed, one=old)
    put(server, "counts", min_requests=5)
    tell("invalid_request", "deadline_exceeded", "memory_full", "invalid_request", "context_length_exceeded")
    tell(failed, "internal_error", None, None, failed, failed)  # and one answer each behind these two
    deadline = time.monotonic() + GUARD_SECONDS
    while not asked:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert asked == ["4 of 7 requests failed in 60 s"]


def test_what_a_client_asks_in_vain_is_not_counted(server: Running, adapters: list[Path]) -> None:
    put(server, "asked", min_requests=1000)
    impossible = {"model": "asked", "prompt": "a", "structured_outputs": {"regex": "a"}, "allowed_token_ids": [66]}
    for number in range(20):
        refused = server.client.post("/v1/completions", json={**impossible, "user": str(number)})
        assert refused.status_code == 400, refused.text
    assert "acme~asked" not in server.service.canaries._windows  # noqa: SLF001
    assert server.client.delete("/v1/aliases/asked").status_code == 200


def test_one_that_is_shared_no_more_steps_back(server: Running, adapters: list[Path]) -> None:
    own = {"authorization": "Bearer own"}
    client, theirs = server.client, server.client.headers["authorization"]
    client.headers["authorization"] = own["authorization"]
    assert server.put("lent", adapters[1]).status_code == 201
    assert client.patch("/v1/adapters/lent", json={"shared_with": ["acme"]}).status_code == 200
    client.headers["authorization"] = theirs
    split = [{"target": "sql@1", "weight": 1}, {"target": "default~lent@1", "weight": 999}]
    canary = CANARY | {"target": "default~lent@1", "max_error_rate": 0.0, "min_requests": 2}
    assert client.put("/v1/aliases/lost", json={"targets": split, "canary": canary}).status_code == 200
    assert client.patch("/v1/adapters/lent", json={"shared_with": []}, headers=own).status_code == 200
    answers = [server.generate("lost", PROMPT, 1, user=None).status_code for _ in range(8)]
    assert answers.count(404) >= 2
    assert "2 of 2 requests failed" in stepped_back(server, "lost")["canary"]["reason"]
    assert server.generate("lost", PROMPT, 1).headers["x-swaplora-adapter"] == "sql@1"
    assert client.delete("/v1/aliases/lost").status_code == 200


def test_a_window_forgets() -> None:
    now = 0.0
    window = Window(60.0, lambda: now)
    assert [window.note(has_failed=True) for _ in range(3)] == [(1, 1), (2, 2), (3, 3)]
    now = 59.5
    assert window.note(has_failed=False) == (4, 3)
    now = 60.5
    assert window.note(has_failed=False) == (2, 0)
    for number in range(10_000):
        now = 61 + number / 10
        assert window.note(has_failed=False)[0] <= 601
    assert len(window._counts) <= 60  # noqa: SLF001


def reopened(server: Running, file: Path, now: float) -> tuple[Canaries, Callable[[], Trial | None]]:
    """What another server would count by, and who hears of a request that goes to the canary of `counted`."""
    registry = server.service._registry  # noqa: SLF001
    canaries = Canaries(registry, server.service.audit, server.service.metrics.count_step_back, file, lambda: now)
    record = registry.names.index.resolve_name("acme~sql@2")
    return canaries, lambda: canaries.trial("acme~counted", "acme~sql", record)


async def test_what_is_counted_outlives_a_server(server: Running, tmp_path: Path) -> None:
    file, told = tmp_path / "canaries.json", put(server, "counted")
    first, trial = reopened(server, file, 1000.0)
    for _ in range(3):
        heard = trial()
        assert heard is not None
        heard("engine_failed")
    first.close()
    kept = file.read_bytes()
    put(server, "counted", min_requests=3)
    other, _ = reopened(server, file, 1001.0)
    assert other._windows == {}, "it is another canary"  # noqa: SLF001
    assert put(server, "counted") == told
    assert not file.exists(), "what was read once is not there for the successor of one that is killed"
    file.write_bytes(kept)
    late, trial = reopened(server, file, 1062.0)
    heard = trial()
    assert heard is not None
    heard("engine_failed")
    assert not late._steps, "what was counted is too long ago"  # noqa: SLF001
    file.write_bytes(kept)
    _, trial = reopened(server, file, 1001.0)
    heard = trial()
    assert heard is not None
    heard("engine_failed")
    found = await asyncio.to_thread(stepped_back, server, "counted")
    assert found["canary"]["reason"] == "4 of 4 requests failed in 60 s"
    file.write_text("{")
    assert reopened(server, file, 1001.0)[0]._windows == {}  # noqa: SLF001
    assert server.client.delete("/v1/aliases/counted").status_code == 200


async def test_what_was_counted_before_an_alias_was_put_again_is_not_kept(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "canaries.json"
    put(server, "counted")
    canaries, trial = reopened(server, file, 1000.0)
    heard = trial()
    assert heard is not None
    heard("engine_failed")
    put(server, "counted")  # the same again: a canary of its own, of which nothing was heard yet
    canaries.close()
    assert reopened(server, file, 1001.0)[0]._windows == {}  # noqa: SLF001
    assert server.client.delete("/v1/aliases/counted").status_code == 200


def test_one_that_was_changed_meanwhile_stays(server: Running) -> None:
    put(server, "changed")
    registry = server.service.registry
    before = registry.names.index.alias("acme~changed").canary
    assert before is not None
    for changed in ({}, {"min_requests": 9}):
        put(server, "changed", **changed)
        assert not registry.step_back("acme~changed", before, "why")
    assert server.client.get("/v1/aliases/changed").json()["targets"] == SPLIT
    assert server.client.delete("/v1/aliases/changed").status_code == 200
    assert not registry.step_back("acme~changed", before, "why")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"target": "sql", "canary": CANARY}, "must be one of the targets"),
        ({"targets": SPLIT, "canary": CANARY | {"target": "sql@9"}}, "must be one of the targets"),
        ({"targets": [{"target": "sql", "weight": 1}], "canary": CANARY | {"target": "sql"}}, "and a version"),
        ({"targets": SPLIT[1:], "canary": CANARY}, "another target must have a weight"),
        ({"targets": SPLIT, "canary": CANARY | {"max_error_rate": 1}}, "max_error_rate"),
        ({"targets": SPLIT, "canary": CANARY | {"window_seconds": 0}}, "window_seconds"),
        ({"targets": SPLIT, "canary": {"target": "sql@2"}}, "max_error_rate"),
        ({"targets": SPLIT, "canary": CANARY | {"stepped_back": 1}}, "stepped_back"),
    ],
)
def test_what_is_no_canary_is_refused(server: Running, body: dict[str, Any], words: str) -> None:
    refused = server.client.put("/v1/aliases/refused", json=body)
    assert refused.status_code == 400
    assert words in refused.json()["error"]["message"]
