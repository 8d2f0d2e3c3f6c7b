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
