"""Aliases over HTTP: what they lead to, how they split, and that nothing is deleted from under them."""

from pathlib import Path

import pytest

from serving import BASE, Running, serving, settings
from swaplora_adapters.store.records import Alias, Target

PROMPT = list(range(30, 50))


@pytest.fixture
def loaded(server: Running, adapters: list[Path]) -> Running:
    for name, folder in [("sql", adapters[1]), ("sql", adapters[2]), ("json", adapters[3])]:
        server.put(name, folder)
    return server


def served_by(server: Running, model: str, **request: object) -> str:
    headers = {"X-Session-Id": str(request.pop("session"))} if "session" in request else {}
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, **request}
    answer = server.client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.headers["x-swaplora-adapter"]


def test_an_alias_answers_as_what_it_leads_to_and_says_so(loaded: Running) -> None:
    versions = len(loaded.client.get("/v1/adapters/sql").json()["versions"])
    for target, served in [("sql", f"sql@{versions}"), ("sql@1", "sql@1"), ("json", "json@1")]:
        answer = loaded.client.put("/v1/aliases/prod", json={"target": target})
        assert answer.json() == {"object": "alias", "alias": "prod", "targets": [{"target": target, "weight": 1}]}
        assert served_by(loaded, "prod") == served_by(loaded, "base:prod") == served
        assert loaded.token_ids("prod", PROMPT) == loaded.token_ids(target, PROMPT)
    root = loaded.client.get("/v1/adapters/json").json()["digest"]
    assert loaded.client.get("/v1/models/prod").json()["root"] == root
    assert (
        loaded.client.get("/v1/models/base:prod").json() | {"id": "prod"} == loaded.client.get("/v1/models/prod").json()
    )
    assert "prod" in [model["id"] for model in loaded.client.get("/v1/models").json()["data"]]
    assert loaded.client.delete("/v1/aliases/prod").json() == {"object": "alias.deleted", "alias": "prod"}
    assert loaded.client.delete("/v1/aliases/prod").json()["error"]["code"] == "alias_not_found"
    assert loaded.generate("prod", PROMPT).json()["error"]["code"] == "model_not_found"


def test_a_split_is_shared_by_weight_and_sticks_to_a_client(loaded: Running) -> None:
    targets = [{"target": "sql@1", "weight": 70}, {"target": "json", "weight": 30}]
    loaded.client.put("/v1/aliases/canary", json={"targets": targets})
    by_user = {user: served_by(loaded, "canary", user=user) for user in map(str, range(30))}
    assert set(by_user.values()) == {"sql@1", "json@1"}
    assert by_user == {user: served_by(loaded, "canary", user=user) for user in by_user}
    # a session header goes before the user
    assert {served_by(loaded, "canary", user=user, session="s") for user in map(str, range(10))} == {
        served_by(loaded, "canary", session="s")
    }
    nobody: list[dict[str, object]] = [{}, {"user": ""}, {"session": ""}, {"session": "", "user": ""}]
    for who in nobody:
        assert {served_by(loaded, "canary", **who) for _ in range(60)} == {"sql@1", "json@1"}
    assert loaded.client.get("/v1/models/canary").json()["root"] is None
    loaded.client.put("/v1/aliases/canary", json={"targets": [targets[0] | {"weight": 0}, targets[1]]})
    assert {served_by(loaded, "canary", user=user) for user in by_user} == {"json@1"}
    loaded.client.delete("/v1/aliases/canary")


def test_an_alias_that_ceases_to_lead_anywhere_does_not_take_the_list_with_it(loaded: Running) -> None:
    loaded.client.put("/v1/aliases/fine", json={"target": "json"})
    index = loaded.service.registry.names.index
    for alias, reference in [("gone", "nobody"), ("gone-version", "sql@99")]:
        index.put_alias(Alias(alias, (Target(reference, 1),)))  # as it is seen between two deletes
    try:
        models = [model["id"] for model in loaded.client.get("/v1/models").json()["data"]]
        gone = loaded.client.get("/v1/models/gone")
    finally:
        index.remove_alias("gone")
        index.remove_alias("gone-version")
        loaded.client.delete("/v1/aliases/fine")
    assert models == [BASE, "json", "sql", "fine"]
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


def test_what_an_alias_needs_is_not_deleted_from_under_it(loaded: Running) -> None:
    loaded.client.put("/v1/aliases/prod", json={"target": "sql@1"})
    for path in ("/v1/adapters/sql", "/v1/adapters/sql?version=1"):
        answer = loaded.client.delete(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_busy")
        assert "prod" in answer.json()["error"]["message"]
    assert served_by(loaded, "prod") == "sql@1"
    loaded.client.delete("/v1/aliases/prod")
    assert loaded.client.delete("/v1/adapters/sql?version=1").status_code == 200


@pytest.mark.parametrize(
    ("alias", "body", "status", "code"),
    [
        ("a", {"target": "nobody"}, 404, "adapter_not_found"),
        ("a", {"target": "sql@99"}, 404, "version_not_found"),
        ("a", {"target": BASE}, 404, "adapter_not_found"),
        ("a", {"target": "other"}, 404, "adapter_not_found"),  # an alias is no target
        ("sql", {"target": "json"}, 400, "invalid_adapter_name"),
        (BASE, {"target": "json"}, 400, "invalid_adapter_name"),
        (".a", {"target": "json"}, 400, "invalid_adapter_name"),
        ("a", {}, 400, "invalid_request"),
        ("a", {"target": "sql", "targets": [{"target": "json", "weight": 1}]}, 400, "invalid_request"),
        ("a", {"targets": []}, 400, "invalid_request"),
        ("a", {"targets": [{"target": "json", "weight": 0}]}, 400, "invalid_request"),
        ("a", {"targets": [{"target": "json", "weight": -1}]}, 400, "invalid_request"),
        ("a", {"targets": [{"target": "json", "weight": 0.5}]}, 400, "invalid_request"),
        ("a", {"targets": [{"target": "json"}]}, 400, "invalid_request"),
        ("a", {"targets": [{"target": "json", "weight": 1}] * 2}, 400, "invalid_request"),
        ("a", {"targets": [{"target": "json", "weight": 1}] * 17}, 400, "invalid_request"),
        ("a", {"target": "sql", "wait": 3}, 400, "invalid_request"),
    ],
)
def test_an_alias_that_could_not_be_followed_is_refused(
    loaded: Running, alias: str, body: dict[str, object], status: int, code: str
) -> None:
    loaded.client.put("/v1/aliases/other", json={"target": "json"})
    answer = loaded.client.put(f"/v1/aliases/{alias}", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert [entry["alias"] for entry in loaded.client.get("/v1/aliases").json()["data"]] == ["other"]


def test_an_adapter_cannot_be_called_as_an_alias_is(loaded: Running, adapters: list[Path]) -> None:
    loaded.client.put("/v1/aliases/taken", json={"target": "json"})
    answer = loaded.put("taken", adapters[0])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_adapter_name")
    assert served_by(loaded, "taken") == "json@1"


def test_a_split_is_neither_warmed_nor_inspected(loaded: Running) -> None:
    targets = [{"target": "sql@1", "weight": 1}, {"target": "json", "weight": 1}]
    loaded.client.put("/v1/aliases/split", json={"targets": targets})
    for answer in (
        loaded.client.post("/v1/adapters/split/warm"),
        loaded.client.get("/v1/adapters/split/inspect"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")
    loaded.client.delete("/v1/aliases/split")


def test_a_query_that_is_not_known_is_refused(loaded: Running) -> None:
    loaded.client.put("/v1/aliases/asked", json={"target": "json"})
    for method, path in [("DELETE", "/v1/aliases/asked?if=x"), ("GET", "/v1/adapters/json/inspect?versoin=1")]:
        answer = loaded.client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert loaded.client.delete("/v1/aliases/asked").status_code == 200


def test_aliases_survive_a_restart(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    body = {"targets": [{"target": "a", "weight": 3}, {"target": "a@1", "weight": 1}]}
    with serving(settings(base, tmp_path)) as server:
        server.put("a", adapters[0])
        server.client.put("/v1/aliases/b", json=body)
    with serving(settings(base, tmp_path)) as server:
        assert server.client.get("/v1/aliases/b").json() == {"object": "alias", "alias": "b"} | body
        assert served_by(server, "b") == "a@1"
