"""The routes that control planes of other servers call, answered to the letter."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving import Running, serving, settings
from tiny import edit_config

PROMPT = list(range(30, 50))


@pytest.fixture(scope="module")
def controlled(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with an adapter folder that it does not look at by itself."""
    folder = tmp_path_factory.mktemp("folder")
    with serving(
        settings(base, tmp_path_factory.mktemp("data"), adapter_dir=folder, adapter_rescan_seconds=0)
    ) as running:
        for number in (1, 2):
            shutil.copytree(adapters[number], folder / "store" / f"a{number}")
        yield running


def folder_of(server: Running, name: str) -> str:
    return str(server.service.settings.adapter_dir) + f"/store/{name}"


def load(server: Running, **body: object) -> httpx.Response:
    return server.client.post("/v1/load_lora_adapter", json=body)


def unload(server: Running, **body: object) -> httpx.Response:
    return server.client.post("/v1/unload_lora_adapter", json=body)


def assert_refused(answer: httpx.Response, status: int, kind: str, words: str) -> None:
    """The error is there both ways: flat as vLLM has it, and nested with our stable code."""
    assert answer.status_code == status, answer.text
    flat, nested = answer.json(), answer.json()["error"]
    assert (flat["object"], flat["type"], flat["code"], flat["param"]) == ("error", kind, status, None)
    assert nested["type"] == kind
    assert nested["code"].islower()
    assert flat["message"] == nested["message"]
    assert words in nested["message"]


def test_one_that_a_gate_holds_back_is_said_to_wait(controlled: Running) -> None:
    load(controlled, lora_name="held", lora_path="store/a1")
    gate = {"task": [{"prompt": "a", "regex": "^no such answer$"}], "min_score": 1, "max_tokens": 1}
    assert controlled.client.put("/v1/adapters/held/gate", json=gate).status_code == 200
    answer = load(controlled, lora_name="held", lora_path="store/a2", load_inplace=True)
    held = "as version 2, which its gate holds back (candidate): version 1 answers until it has passed."
    assert (answer.status_code, answer.text) == (200, f"Success: LoRA adapter 'held' added successfully {held}")
    assert unload(controlled, lora_name="held").status_code == 200


def test_an_adapter_is_loaded_replaced_and_unloaded(controlled: Running) -> None:
    answer = load(controlled, lora_name="sql", lora_path=folder_of(controlled, "a1"))
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert answer.headers["content-type"].startswith("text/plain")
    first = controlled.token_ids("sql", PROMPT)
    again = load(controlled, lora_name="sql", lora_path=folder_of(controlled, "a2"))
    assert_refused(again, 400, "InvalidUserInput", "has already been loaded")
    assert controlled.token_ids("sql", PROMPT) == first
    replaced = load(controlled, lora_name="sql", lora_path="store/a2", load_inplace=True)
    assert (replaced.status_code, replaced.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert controlled.token_ids("sql", PROMPT) != first
    answer = unload(controlled, lora_name="sql")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert controlled.generate("sql", PROMPT).status_code == 404
    assert_refused(unload(controlled, lora_name="sql"), 404, "NotFoundError", "cannot be found.")


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"lora_name": "x", "lora_path": "/etc"}, 400, "InvalidUserInput", "--adapter-dir"),
        ({"lora_name": "x", "lora_path": "../x"}, 400, "InvalidUserInput", "'..'"),
        ({"lora_name": "x", "lora_path": "nobody"}, 404, "NotFoundError", "file:nobody"),
        ({"lora_name": "x", "lora_path": "hf://org/repo"}, 400, "InvalidUserInput", "--allow-source"),
        ({"lora_name": "../x", "lora_path": "store/a1"}, 400, "InvalidUserInput", "name"),
        ({"lora_name": "base", "lora_path": "store/a1"}, 400, "InvalidUserInput", "the base is called"),
        ({"lora_name": "x"}, 400, "InvalidUserInput", "lora_path"),
        ({"lora_path": "store/a1"}, 400, "InvalidUserInput", "lora_name"),
        ({"lora_name": "x", "lora_path": "store/a1", "load_inplace": 1}, 400, "InvalidUserInput", "load_inplace"),
        ({"lora_name": "", "lora_path": ""}, 400, "InvalidUserInput", "lora_name"),
    ],
)
def test_a_load_that_cannot_be_done_says_why_both_ways(
    controlled: Running, body: dict[str, object], status: int, kind: str, words: str
) -> None:
    assert_refused(load(controlled, **body), status, kind, words)
    assert controlled.generate("x", PROMPT).status_code == 404


def test_sagemakers_routes(controlled: Running) -> None:
    body = {"name": "eden", "src": folder_of(controlled, "a1"), "pin": True}
    assert controlled.client.post("/adapters", json=body).text == "Success: LoRA adapter 'eden' added successfully."
    card = controlled.client.get("/v1/adapters/eden").json()
    assert (card["state"], card["pinned"]) == ("resident", True)
    assert_refused(controlled.client.post("/adapters", json=body), 400, "InvalidUserInput", "already been loaded")
    answer = controlled.client.delete("/adapters/eden")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'eden' removed successfully.")
    assert_refused(controlled.client.delete("/adapters/eden"), 404, "NotFoundError", "cannot be found.")
    lazy = controlled.client.post("/adapters", json={"name": "lazy", "src": "store/a2", "preload": False})
    assert lazy.status_code == 200
    assert controlled.client.get("/v1/adapters/lazy").json()["state"] == "stored"


def test_a_body_that_is_no_json_is_told_both_ways_too(controlled: Running) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"):
        assert_refused(controlled.client.post(path, content=b"{"), 400, "InvalidUserInput", "JSON")


def test_what_control_planes_send_beside_is_ignored(controlled: Running) -> None:
    loaded = load(controlled, lora_name="extra", lora_path="store/a1", base_model_name="base", lora_int_id=7)
    assert loaded.status_code == 200, loaded.text
    unloaded = unload(controlled, lora_name="extra", lora_int_id=7, base_model_name="base")
    assert unloaded.status_code == 200, unloaded.text


def test_a_registration_whose_pin_does_not_fit_leaves_nothing_behind(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    for number in (1, 2):
        shutil.copytree(adapters[7], tmp_path / "folder" / "store" / f"a{number}")
    edit_config(tmp_path / "folder" / "store" / "a2", lora_alpha=3)
    fields = {"adapter_dir": tmp_path / "folder", "adapter_rescan_seconds": 0}
    with serving(settings(base, tmp_path / "probe", **fields)) as server:
        nbytes = 4 * server.put("one", adapters[7]).json()["parameters"]
    with serving(settings(base, tmp_path / "data", adapter_memory_bytes=nbytes * 3 // 2, **fields)) as server:
        body = {"name": "one", "src": "store/a1", "pin": True, "preload": False}
        assert server.client.post("/adapters", json=body).status_code == 200
        for _ in range(2):
            refused = server.client.post("/adapters", json=body | {"name": "two", "src": "store/a2"})
            assert_refused(refused, 507, "InternalServerError", "pinned")
            assert (refused.headers["retry-after"], refused.json()["error"]["code"]) == ("5", "memory_full")
            assert server.client.get("/v1/adapters/two").status_code == 404
        assert server.client.delete("/adapters/one").status_code == 200
        assert server.client.post("/adapters", json=body | {"name": "two", "src": "store/a2"}).status_code == 200


def test_a_missing_key_is_told_both_ways_too(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, api_key=("secret",))) as server:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"):
            refused = server.client.post(path, json={})
            assert_refused(refused, 401, "InvalidUserInput", "API key")
            assert refused.json()["error"]["code"] == "invalid_api_key"


def test_a_repositorys_name_is_loaded_asked_replaced_and_unloaded(controlled: Running) -> None:
    name, client = "org/Adapter-1.v2", controlled.client
    assert load(controlled, lora_name=name, lora_path="store/a1").text == (
        f"Success: LoRA adapter '{name}' added successfully."
    )
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert models[name]["root"] == models["org--Adapter-1.v2"]["root"]
    assert client.get(f"/v1/models/{name}").json()["id"] == name
    answer = controlled.generate(name, PROMPT)
    assert answer.headers["x-swaplora-adapter"] == "org--Adapter-1.v2@1"
    assert answer.json()["model"] == name
    first = controlled.token_ids(name, PROMPT)
    assert first == controlled.token_ids("org--Adapter-1.v2", PROMPT)
    again = load(controlled, lora_name=name, lora_path="store/a2")
    assert_refused(again, 400, "InvalidUserInput", "has already been loaded")
    assert load(controlled, lora_name=name, lora_path="store/a2", load_inplace=True).status_code == 200
    assert controlled.token_ids(name, PROMPT) != first
    assert unload(controlled, lora_name=name).text == f"Success: LoRA adapter '{name}' removed successfully."
    for gone in (name, "org--Adapter-1.v2"):
        assert controlled.generate(gone, PROMPT).status_code == 404
    assert client.get("/v1/aliases").json()["data"] == []
    assert_refused(unload(controlled, lora_name=name), 404, "NotFoundError", "cannot be found.")


def test_repositories_whose_names_are_stored_alike_do_not_take_each_others_place(controlled: Running) -> None:
    client = controlled.client
    assert load(controlled, lora_name="a--b/c", lora_path="store/a1").status_code == 200
    said = controlled.token_ids("a--b/c", PROMPT)
    for body in ({"load_inplace": True}, {}):
        for other in ("a/b--c", "a/b/c"):
            refused = load(controlled, lora_name=other, lora_path="store/a2", **body)
            assert_refused(refused, 400, "InvalidUserInput", "an adapter of that name already")
            assert f"PUT /v1/aliases/{other}" in refused.json()["message"]
            assert_refused(unload(controlled, lora_name=other), 404, "NotFoundError", "cannot be found.")
    assert controlled.token_ids("a--b/c", PROMPT) == said
    assert client.put("/v1/aliases/a/b--c", json={"target": "a--b--c"}).json()["alias"] == "a/b--c"  # as it was told
    assert controlled.token_ids("a/b--c", PROMPT) == said
    busy = unload(controlled, lora_name="a--b/c")
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "adapter_busy")
    assert controlled.token_ids("a--b/c", PROMPT) == said
    assert client.delete("/v1/adapters/a--b--c").status_code == 409
    assert client.delete("/v1/aliases/a/b--c").status_code == 200
    assert unload(controlled, lora_name="a--b/c").status_code == 200


def test_a_repositorys_name_that_is_something_elses_is_refused(controlled: Running) -> None:
    client = controlled.client
    assert load(controlled, lora_name="one", lora_path="store/a1").status_code == 200
    assert client.put("/v1/aliases/team/one", json={"target": "one"}).status_code == 200
    for inplace in (True, False):
        refused = load(controlled, lora_name="team/one", lora_path="store/a2", load_inplace=inplace)
        assert_refused(refused, 400, "InvalidUserInput", "an alias for something else")
    assert_refused(unload(controlled, lora_name="team/one"), 404, "NotFoundError", "cannot be found.")
    assert client.delete("/v1/aliases/team/one").status_code == 200
    assert unload(controlled, lora_name="one").status_code == 200


@pytest.mark.parametrize("name", ["a/", "/a", "a//b", "a/../b", "a/.b", "../a", "a/b c", "a\\b/c", "a/" + "b" * 126])
def test_what_is_no_repositorys_name_is_refused(controlled: Running, name: str) -> None:
    assert_refused(load(controlled, lora_name=name, lora_path="store/a1"), 400, "InvalidUserInput", "name")
    assert controlled.client.get("/v1/aliases").json()["data"] == []


def test_sagemakers_routes_take_a_repositorys_name_too(controlled: Running) -> None:
    body = {"name": "org/eden", "src": "store/a1", "pin": True}
    assert controlled.client.post("/adapters", json=body).status_code == 200
    assert controlled.client.get("/v1/adapters/org--eden").json()["state"] == "resident"
    invoked = controlled.client.post(
        "/invocations",
        json={"model": "base", "prompt": PROMPT, "max_tokens": 1},
        headers={"X-Amzn-SageMaker-Adapter-Identifier": "org/eden"},
    )
    assert invoked.headers["x-swaplora-adapter"] == "org--eden@1"
    for path in ("/adapters/org/eden", "/adapters/org%2Feden"):
        answer = controlled.client.delete(path)
        assert answer.status_code == (200 if path == "/adapters/org/eden" else 404), answer.text


def test_a_repositorys_name_is_there_after_a_restart_and_where_the_catalogue_was_lost(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(adapters[1], tmp_path / "folder" / "store" / "a1")
    fields = {"adapter_dir": tmp_path / "folder", "adapter_rescan_seconds": 0}
    with serving(settings(base, tmp_path / "data", **fields)) as server:
        assert load(server, lora_name="org/kept", lora_path="store/a1").status_code == 200
        said = server.token_ids("org/kept", PROMPT)
    with serving(settings(base, tmp_path / "data", **fields)) as server:
        assert server.token_ids("org/kept", PROMPT) == said
    for file in (tmp_path / "data").glob("catalogue*"):
        file.unlink()
    with serving(settings(base, tmp_path / "data", **fields)) as server:
        assert server.token_ids("org/kept", PROMPT) == said
        assert unload(server, lora_name="org/kept").status_code == 200
    with serving(settings(base, tmp_path / "data", **fields)) as server:
        assert server.generate("org/kept", PROMPT).status_code == 404
