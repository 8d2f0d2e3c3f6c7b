"""Tenants: each has its names as if there were no others, and cannot tell what another has from what nobody has."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import BASE, Running, serving, settings
from swaplora_adapters.errors import AdapterError
from swaplora_adapters.files.naming import validate_name, without_tenant
from swaplora_adapters.registry.index import Index
from swaplora_adapters.registry.names import Names
from swaplora_adapters.registry.naming import Naming
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.registry.tenant import TenantRegistry
from swaplora_adapters.registry.tenant_names import TenantIndex, TenantNames
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key
from swaplora_server.config import Settings

PROMPT = [5, 6, 7, 8, 9]
ALL = (KeyScope.GENERATE, KeyScope.READ, KeyScope.WRITE)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    made = {tenant: create_key(file, tenant, ALL)[0] for tenant in ("acme", "zeta", "default")}
    return {"file": str(file), "admin": "own"} | made


@pytest.fixture(scope="module")
def config(
    base: Path, adapters: list[Path], keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    return settings(
        base,
        tmp_path_factory.mktemp("data"),
        api_key=("own",),
        key_file=keys["file"],
        adapter_dir=adapters[0].parent,
        adapter_rescan_seconds=0,
    )


@pytest.fixture(scope="module")
def shared(config: Settings, adapters: list[Path], keys: dict[str, str]) -> Iterator[Running]:
    """acme has `sql`, `only` and the alias `prod`; the default tenant has the adapter folder's; zeta has `sql`."""
    with serving(config) as server:
        fill(server, adapters, keys)
        yield server


def fill(server: Running, adapters: list[Path], keys: dict[str, str]) -> None:
    for tenant, name, number in (("acme", "sql", 1), ("acme", "only", 2), ("zeta", "sql", 3)):
        become(server, keys[tenant])
        assert server.put(name, adapters[number]).status_code == 201
    become(server, keys["acme"])
    assert server.client.put("/v1/aliases/prod", json={"target": "only"}).status_code == 200
    assert server.client.put("/v1/aliases/org/prod", json={"target": "sql@1"}).status_code == 200


def become(server: Running, key: str) -> httpx.Client:
    server.client.headers["authorization"] = f"Bearer {key}"
    return server.client


def names(client: httpx.Client) -> list[str]:
    return [card["name"] for card in client.get("/v1/adapters").json()["data"]]


def models(client: httpx.Client) -> list[str]:
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


def test_ids_of_other_servers_lead_to_ones_own_alone(shared: Running, keys: dict[str, str]) -> None:
    client = become(shared, keys["acme"])
    listed = {one["path"]: one["id"] for one in client.get("/lora-adapters").json()}
    assert listed.keys() == {"only", "sql"}
    body = {"model": BASE, "prompt": PROMPT, "max_tokens": 1, "lora": [{"id": listed["only"], "scale": 1}]}
    mine = client.post("/v1/completions", json=body)
    assert mine.headers["x-swaplora-adapter"] == "only@1"
    for field in ({"lora": body["lora"]}, {"lora_path": "only"}, {"adapter_id": "only"}):
        asked = {key: value for key, value in body.items() if key != "lora"} | field
        assert client.post("/v1/completions", json=asked).status_code == 200
        refused = become(shared, keys["zeta"]).post("/v1/completions", json=asked)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        become(shared, keys["acme"])
    become(shared, keys["zeta"])
    assert [one["path"] for one in client.get("/lora-adapters").json()] == ["sql"]
    assert client.post("/lora-adapters", json=[{"id": listed["only"], "scale": 0}]).status_code == 404


def test_each_has_its_own_lists(shared: Running, keys: dict[str, str]) -> None:
    folder = [f"a{number}" for number in range(8)]
    for key, own, aliases in (
        ("acme", ["only", "sql"], ["org/prod", "prod"]),
        ("zeta", ["sql"], []),
        ("default", folder, []),
        ("admin", folder, []),
    ):
        client = become(shared, keys[key])
        assert names(client) == own
        assert models(client) == [BASE, *own, *aliases]
        assert [alias["alias"] for alias in client.get("/v1/aliases").json()["data"]] == aliases


def test_one_name_is_two_adapters(shared: Running, keys: dict[str, str]) -> None:
    answers = {}
    for tenant in ("acme", "zeta"):
        become(shared, keys[tenant])
        answer = shared.generate("sql", PROMPT)
        assert answer.headers["x-swaplora-adapter"] == "sql@1"
        card = shared.client.get("/v1/adapters/sql").json()
        assert card["digest"] == answer.headers["x-swaplora-digest"]
        answers[card["digest"]] = answer.json()["choices"][0]["token_ids"]
    become(shared, keys["admin"])
    alone = {
        shared.client.get(f"/v1/adapters/{name}").json()["digest"]: shared.token_ids(name, PROMPT)
        for name in ("a1", "a3")
    }
    assert answers == alone


def requests(name: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Everything that names an adapter or an alias."""
    completion = {"prompt": PROMPT, "max_tokens": 1}
    messages = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    return [
        ("GET", f"/v1/adapters/{name}", {}),
        ("GET", f"/v1/adapters/{name}/inspect", {}),
        ("GET", "/v1/adapters/sql/inspect", {"params": {"against": name}}),
        ("PATCH", f"/v1/adapters/{name}", {"json": {"pinned": True}}),
        ("POST", f"/v1/adapters/{name}/warm", {}),
        ("DELETE", f"/v1/adapters/{name}", {}),
        ("GET", f"/v1/aliases/{name}", {}),
        ("DELETE", f"/v1/aliases/{name}", {}),
        ("PUT", "/v1/aliases/mine", {"json": {"target": name}}),
        ("PUT", "/v1/aliases/mine", {"json": {"target": f"{name}@1"}}),
        ("GET", f"/v1/models/{name}", {}),
        ("GET", f"/v1/models/{name}@1", {}),
        ("POST", "/v1/merged", {"json": {"name": "mine", "from": [{"name": name}]}}),
        ("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": name}}),
        ("DELETE", f"/adapters/{name}", {}),
        ("POST", "/v1/completions", {"json": {"model": name, **completion}}),
        ("POST", "/v1/completions", {"json": {"model": f"base:{name}", **completion}}),
        ("POST", "/v1/completions", {"json": {"model": f"{name}@1", **completion}}),
        ("POST", "/v1/completions", {"json": {"model": BASE, "adapters": [{"name": name}], **completion}}),
        ("POST", "/v1/completions", {"json": {"model": name, "stream": True, **completion}}),
        ("POST", "/v1/chat/completions", {"json": {"model": name, **messages}}),
        ("POST", "/v1/responses", {"json": {"model": name, "input": "x"}}),
        ("POST", "/v1/messages", {"json": {"model": name, **messages}}),
        ("POST", "/invocations", {"json": {"model": name, **completion}}),
        ("POST", "/tokenize", {"json": {"model": name, "prompt": "x"}}),
        ("POST", "/detokenize", {"json": {"model": name, "tokens": [1]}}),
    ]


@pytest.mark.parametrize(
    ("theirs", "nobodys"),
    [
        ("only", "nope"),
        ("prod", "nope"),
        ("acme~only", "acme~nope"),
        ("acme~prod", "nope~prod"),
        ("default~a1", "default~no"),
        ("~a1", "~no"),
        ("a1", "no"),
        ("acme/only", "acme/nope"),
    ],
)
def test_what_another_has_is_as_if_nobody_had_it(
    shared: Running, keys: dict[str, str], theirs: str, nobodys: str
) -> None:
    client = become(shared, keys["zeta"])
    for (method, url, fields), (_, other_url, other_fields) in zip(requests(theirs), requests(nobodys), strict=True):
        one, other = client.request(method, url, **fields), client.request(method, other_url, **other_fields)
        assert one.status_code == other.status_code != 200, (method, url, one.text)
        assert told(one).replace(theirs, nobodys) == told(other), (method, url)
    become(shared, keys["acme"])
    assert names(shared.client) == ["only", "sql"]


def told(answer: httpx.Response) -> str:
    return answer.text + str(sorted(set(answer.headers) - {"content-length", "connection"}))


@pytest.mark.parametrize("name", ["acme~only", "acme~prod", "acme~sql@1", "base:acme~only", "~only"])
def test_nor_does_an_administrator_reach_it_by_what_it_is_stored_as(
    shared: Running, keys: dict[str, str], name: str
) -> None:
    client = become(shared, keys["admin"])
    for method, url, fields in requests(name):
        answer = client.request(method, url, **fields)
        assert answer.status_code in (400, 404), (method, url, answer.text)
    become(shared, keys["acme"])
    assert names(shared.client) == ["only", "sql"]


def test_names_are_in_nobody_elses_way(shared: Running, keys: dict[str, str], adapters: list[Path]) -> None:
    client = become(shared, keys["zeta"])
    assert shared.put("prod", adapters[4], **{"If-None-Match": "*"}).status_code == 201
    assert client.put("/v1/aliases/only", json={"target": "prod"}).status_code == 200
    assert shared.generate("only", PROMPT).headers["x-swaplora-adapter"] == "prod@1"
    busy = client.delete("/v1/adapters/prod")
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "adapter_busy")
    assert "zeta" not in busy.text
    again = shared.put("only", adapters[4])
    assert again.json()["error"]["message"].startswith("only is an alias")
    assert client.delete("/v1/aliases/only").status_code == 200
    assert client.delete("/v1/adapters/prod").status_code == 200
    assert names(client) == ["sql"]
    become(shared, keys["acme"])
    assert shared.generate("prod", PROMPT).headers["x-swaplora-adapter"] == "only@1"


def test_a_tenant_works_as_the_only_one(shared: Running, keys: dict[str, str], adapters: list[Path]) -> None:
    """Versions, conditions, pins, merges, sums and other servers' routes; what is told is without the tenant."""
    client = become(shared, keys["zeta"])
    answers = [shared.put("two", adapters[4]), shared.put("two", adapters[5])]
    assert [answer.status_code for answer in answers] == [201, 200]
    assert shared.put("two", adapters[6], **{"If-None-Match": "*"}).status_code == 412
    answers += [
        client.patch("/v1/adapters/two", json={"current": 1, "pinned": True}),
        client.post("/v1/adapters/two@2/warm"),
        client.get("/v1/adapters/two/inspect", params={"against": "sql"}),
        client.post("/v1/merged", json={"name": "both", "from": [{"name": "two"}]}),
        client.get("/v1/adapters/both"),
        shared.generate("base:two@2", PROMPT),
        shared.generate(BASE, PROMPT, adapters=[{"name": "two", "scale": 1}, {"name": "sql", "scale": -1}]),
        client.get("/v1/models/two@2"),
        client.delete("/v1/adapters/two", params={"version": 2}),
    ]
    assert [answer.status_code for answer in answers] == [201, *[200] * 4, 201, *[200] * 5]
    assert answers[7].headers["x-swaplora-adapter"] == "two@2"
    assert answers[8].headers["x-swaplora-adapter"] == "two@1, sql@1"
    bad = client.put("/v1/adapters/two", files={"config": b"{}", "weights": b"x"})
    assert bad.status_code == 422
    assert client.get("/v1/adapters/two").json()["last_failure"]["reason"]
    for name in ("both", "two"):
        answers.append(client.post("/v1/unload_lora_adapter", json={"lora_name": name}))
        assert answers[-1].status_code == 200
    assert all("zeta" not in answer.text + str(answer.headers) for answer in answers)
    assert names(client) == ["sql"]


def test_the_adapter_folder_is_the_default_tenants(shared: Running, keys: dict[str, str]) -> None:
    client = become(shared, keys["zeta"])
    for refused in (
        client.put("/v1/adapters/mine", json={"source": "file:a1"}),
        client.post("/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": "a1"}),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "source_not_allowed")
    assert shared.generate("a1", PROMPT).status_code == 404
    become(shared, keys["default"])
    assert shared.generate("a1", PROMPT).status_code == 200


def test_no_tenants_adapter_is_called_as_the_base_is(
    shared: Running, keys: dict[str, str], adapters: list[Path]
) -> None:
    for key in ("zeta", "admin"):
        client = become(shared, keys[key])
        assert shared.put(BASE, adapters[1]).json()["error"]["code"] == "invalid_adapter_name"
        answer = client.put(f"/v1/aliases/{BASE}", json={"target": "sql"})
        assert answer.json()["error"]["code"] == "invalid_adapter_name"


def test_a_prompt_that_another_has_sent_is_not_found_in_the_prefix_cache(shared: Running, keys: dict[str, str]) -> None:
    prompt = list(range(10, 60))

    def cached(tenant: str, **fields: Any) -> int:
        become(shared, keys[tenant])
        usage = shared.generate(BASE, prompt, 1, **fields).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached("acme"), cached("zeta"), cached("default")] == [0, 0, 0]
    for salt in ("acme", "acme\0", "\0", "zeta\0"):  # what would lead there, if salts were only joined
        assert cached("default", cache_salt=salt) == 0
        assert cached("zeta", cache_salt=salt) == 0
    assert all(cached(tenant) >= 32 for tenant in ("acme", "zeta", "default"))


def test_metrics_tell_tenants_apart_and_are_an_administrators(shared: Running, keys: dict[str, str]) -> None:
    for tenant in ("acme", "zeta"):
        become(shared, keys[tenant])
        shared.token_ids("sql", PROMPT)
        assert shared.client.get("/metrics").status_code == 403
    text = become(shared, keys["admin"]).get("/metrics").text
    assert all(f'"{stored}"' in text for stored in ("acme~sql", "zeta~sql"))
    assert '"sql"' not in text


def test_a_restart_knows_whose_is_what(
    config: Settings, adapters: list[Path], keys: dict[str, str], tmp_path: Path
) -> None:
    config = config.model_copy(update={"data_dir": tmp_path})
    with serving(config) as server:
        fill(server, adapters, keys)
    (tmp_path / "catalogue.sqlite3").unlink()  # what the files say is enough
    with serving(config) as server:
        assert names(become(server, keys["acme"])) == ["only", "sql"]
        assert models(server.client) == [BASE, "only", "sql", "org/prod", "prod"]
        assert server.generate("prod", PROMPT).headers["x-swaplora-adapter"] == "only@1"
        assert names(become(server, keys["zeta"])) == ["sql"]
        assert len(names(become(server, keys["admin"]))) == 8


ANY_NAME = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
ANY_TENANT = st.just("") | st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,62}\Z")


@given(ANY_TENANT, ANY_TENANT, ANY_NAME, ANY_NAME)
def test_no_two_names_are_stored_as_one(one: str, other: str, name: str, another: str) -> None:
    naming, others = Naming(one), Naming(other)
    stored = naming.stored(name)
    assert naming.said(stored) == without_tenant(stored) == validate_name(name)
    assert len(stored) < 200  # a file is called so
    assert (stored == others.stored(another)) == ((one, name) == (other, another))
    assert naming.is_own(stored)
    assert others.is_own(stored) == (one == other)
    assert not Naming(one).is_own(others.stored(another)) or one == other


@given(ANY_TENANT, ANY_TENANT, ANY_NAME)
def test_an_adapter_has_one_name_for_all_who_may_ask_it_and_leads_to_its_owner(one: str, other: str, name: str) -> None:
    asked = f"{other or 'default'}~{name}"
    naming, owner = Naming(one), Naming(other)
    assert naming.key(asked) == owner.key(name) == owner.stored(name)
    assert naming.is_own(naming.key(asked)) == (one == other)
    assert naming.said(owner.key(name)) == (name if one == other else asked)
    for shared_with in ((), ("*",), (one or "default",), ("nobody",)):
        is_shared = "*" in shared_with or (one or "default") in shared_with
        assert naming.sees(owner.key(name), shared_with) == (one == other or is_shared)
    with pytest.raises(AdapterError):
        naming.stored_alias(asked)


@given(ANY_TENANT, st.text(max_size=20), st.text(max_size=20))
def test_whatever_is_said_leads_to_a_tenant_or_nowhere(tenant: str, before: str, behind: str) -> None:
    naming = Naming(tenant)
    with pytest.raises(AdapterError):
        naming.stored_alias(f"{before}~{behind}")
    with suppress(AdapterError):
        owner, _, _ = naming.stored(f"{before}~{behind}").rpartition("~")
        assert re.fullmatch(r"(?:[a-z0-9][a-z0-9-]{0,62})?", owner)


OPERATORS = {
    Registry: {"check_integrity", "close", "host_bytes", "memory_budget", "pins_not_kept", "resident_bytes", "states"}
    | {"extras", "judge", "revision", "seen", "step_back", "stop", "waits_for_store"},
    Names: {"change", "origin", "outdated", "publish", "put_alias", "remove", "remove_alias", "state"}
    | {"check_is_news", "has_read", "set_read"}
    | {"is_due", "judge", "may_follow", "set_gate", "successor", "was_used", "check_is_not_base", "put_mixture"}
    | {"bring", "remove_mixture", "step_back"},
    Index: {"aliases_that_need", "digests", "names_of", "num_aliases", "put", "put_alias", "remove", "remove_alias"},
}


@pytest.mark.parametrize(
    ("whole", "part"),
    [(Registry, TenantRegistry), (Names, TenantNames), (Index, TenantIndex)],
    ids=lambda c: c.__name__,
)
def test_what_a_tenant_can_reach_is_its_own(whole: type, part: type) -> None:
    """What is added to the registry is defined for tenants as well, or fails for them: it has none of its state."""
    assert {name for name in vars(whole) if not name.startswith("_")} - OPERATORS[whole] <= vars(part).keys() | {
        "index"
    }
    assert "__init__" in vars(part)
