"""A name that no adapter may have is refused at every door, in the same words, before anything is fetched or made."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import BASE, Running, serving, settings
from swaplora_adapters.errors import InvalidAdapterNameError
from swaplora_adapters.files.naming import CONFIG_FILE, validate_name
from swaplora_adapters.sources.watcher import FolderWatcher, put_folder

BAD_NAMES = [".hidden", "-dash", "a b", "ü", "a" * 129, "a@1", "a:b"]
PROMPT = list(range(30, 50))


@pytest.fixture(scope="module")
def server(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With an adapter folder that has every bad name, as good adapters but for one."""
    folder = tmp_path_factory.mktemp("folder")
    for name in BAD_NAMES:
        shutil.copytree(adapters[0], folder / name)
    (folder / BAD_NAMES[0] / CONFIG_FILE).write_text("this would be told if it were read")
    options = {"adapter_dir": folder, "adapter_rescan_seconds": 0}
    with serving(settings(base, tmp_path_factory.mktemp("data"), **options)) as running:
        assert running.put("good", adapters[0]).status_code == 201
        assert running.client.put("/v1/aliases/taken", json={"target": "good"}).status_code == 200
        yield running


def refusal(name: str) -> str:
    if name == BASE:
        return f"{name} is what the base is called; choose another name"
    if name == "taken":
        return "taken is an alias; choose another name, or delete that first"
    with pytest.raises(InvalidAdapterNameError) as caught:
        validate_name(name)
    return str(caught.value)


@pytest.mark.parametrize("name", [*(name for name in BAD_NAMES if len(name) < 129), BASE, "taken"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/adapters/{name}", {"source": "file:nowhere"}),
        ("PUT", "/v1/adapters/{name}?convert=svd", {"source": "file:nowhere"}),
        ("POST", "/v1/merged", {"name": "{name}", "from": [{"name": "nobody"}]}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "{name}", "lora_path": "nowhere"}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "{name}", "lora_path": "nowhere", "load_inplace": True}),
        ("POST", "/adapters", {"name": "{name}", "src": "nowhere"}),
    ],
)
def test_a_bad_name_is_refused_at_the_door(
    server: Running, method: str, path: str, body: dict[str, Any], name: str
) -> None:
    body = {key: value.format(name=name) if isinstance(value, str) else value for key, value in body.items()}
    answer = server.client.request(method, path.format(name=name), json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["message"]) == (400, refusal(name))
    assert error["code"] == "invalid_adapter_name"


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if len(name) < 129])
def test_a_bad_alias_is_refused_before_its_targets_are_looked_at(server: Running, name: str) -> None:
    answer = server.client.put(f"/v1/aliases/{name}", json={"target": "nobody"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["message"]) == (400, "invalid_adapter_name", refusal(name))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_not_looked_for(server: Running, name: str) -> None:
    answer = server.generate(name, PROMPT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert [named.current.name for named in server.service.registry.names.index.all()] == ["good"]


@pytest.mark.parametrize("name", [*BAD_NAMES, BASE, "taken"])
def test_a_folder_of_a_bad_name_is_not_taken_in(server: Running, adapters: list[Path], name: str) -> None:
    with pytest.raises(InvalidAdapterNameError) as caught:
        put_folder(server.service.registry, name, adapters[0])
    assert str(caught.value) == refusal(name)


def test_the_folder_that_is_watched_has_every_bad_name_told(server: Running) -> None:
    told: dict[str, str] = {}
    folder = server.service.settings.adapter_dir
    assert folder is not None
    FolderWatcher(server.service.registry, folder, lambda name, error: told.update({name: str(error)})).scan()
    assert told == {name: refusal(name) for name in BAD_NAMES}


@pytest.mark.parametrize("name", [*BAD_NAMES, BASE, "taken"])
def test_what_passed_no_door_is_refused_where_it_is_published(server: Running, adapters: list[Path], name: str) -> None:
    registry = server.service.registry
    with registry.stage() as staging:
        for file in adapters[0].iterdir():
            shutil.copy(file, staging.path)
        with pytest.raises(InvalidAdapterNameError) as caught:
            registry.put(name, staging, source="upload")
    assert str(caught.value) == refusal(name)
