"""Adapters that a tenant shares: whom it is shared with may ask it, and is told and given nothing else of it."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import BASE, Running, serving, settings
from swaplora_adapters.registry.naming import Naming
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key
from swaplora_server.client import Client
from swaplora_server.config import Settings

PROMPT = [5, 6, 7, 8, 9]
TENANTS = ("acme", "zeta", "my-zeta", "default")
GENERATE, READ, WRITE = (KeyScope.GENERATE, KeyScope.READ, KeyScope.WRITE)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    made = {tenant: create_key(file, tenant, (GENERATE, READ, WRITE))[0] for tenant in TENANTS}
    scoped = {f"zeta {scope}": create_key(file, "zeta", (scope,))[0] for scope in (GENERATE, READ, WRITE)}
    return {"file": str(file), "admin": "own"} | made | scoped


@pytest.fixture(scope="module")
def config(base: Path, keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    data = tmp_path_factory.mktemp("data")
    return settings(base, data, api_key=("own",), key_file=keys["file"], audit_log=data / "audit.jsonl")


@pytest.fixture(scope="module")
def server(config: Settings, adapters: list[Path], keys: dict[str, str]) -> Iterator[Running]:
    """acme has `sql` (two versions), `mine`, and the alias `prod`; zeta has another `sql`; default has `law`."""
    with serving(config) as running:
        for tenant, name, number in (
            ("acme", "sql", 1),
            ("acme", "sql", 2),
            ("acme", "mine", 3),
            ("zeta", "sql", 4),
            ("default", "law", 5),
        ):
            become(running, keys[tenant])
            assert running.put(name, adapters[number]).is_success
        assert become(running, keys["acme"]).put("/v1/aliases/prod", json={"target": "sql"}).is_success
        yield running


@pytest.fixture
def shared(server: Running, keys: dict[str, str]) -> Running:
    """acme shares `sql` with zeta, default shares `law` with all; the requests are zeta's."""
    share(server, keys["acme"], "sql", "zeta")
    share(server, keys["default"], "law", "*")
    become(server, keys["zeta"])
    return server


def become(server: Running, key: str) -> httpx.Client:
    server.client.headers["authorization"] = f"Bearer {key}"
    return server.client


def share(server: Running, key: str, name: str, *tenants: str) -> dict[str, Any]:
    answer = become(server, key).patch(f"/v1/adapters/{name}", json={"shared_with": tenants})
    assert answer.status_code == 200, answer.text
    card: dict[str, Any] = answer.json()
    return card


def names(client: httpx.Client) -> list[str]:
    return [card["name"] for card in client.get("/v1/adapters").json()["data"]]


def models(client: httpx.Client) -> list[str]:
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


def error(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def asked(model: str) -> list[tuple[str, dict[str, Any]]]:
    """Every way to ask an adapter."""
    text, chat = {"prompt": PROMPT, "max_tokens": 1}, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    return [
        ("/v1/completions", {"model": model, **text}),
        ("/v1/completions", {"model": model, "stream": True, **text}),
        ("/v1/completions", {"model": BASE, "adapters": [{"name": model, "scale": 0.5}], **text}),
        ("/v1/completions", {"model": BASE, "adapters": [{"name": "sql"}, {"name": model, "scale": -0.5}], **text}),
        ("/v1/completions", {"model": BASE, "lora_path": model, **text}),
        ("/v1/completions", {"model": f"base:{model}", **text}),
        ("/v1/completions", {"model": f"{BASE}:{model}", **text}),
        ("/v1/completions", {"model": f"{model}@1", **text}),
        ("/v1/chat/completions", {"model": model, **chat}),
        ("/v1/responses", {"model": model, "input": "x"}),
        ("/v1/messages", {"model": model, **chat}),
        ("/invocations", {"model": model, **text}),
        ("/v1/embeddings", {"model": model, "input": "x"}),
        ("/tokenize", {"model": model, "prompt": "x"}),
        ("/detokenize", {"model": model, "tokens": [1]}),
    ]


def other_things(model: str) -> list[tuple[str, str, dict[str, Any]]]:
    """All that is not asking it."""
    return [
        ("PATCH", f"/v1/adapters/{model}", {"json": {"pinned": True}}),
        ("PATCH", f"/v1/adapters/{model}", {"json": {"current": 1}}),
        ("PATCH", f"/v1/adapters/{model}", {"json": {"shared_with": ["*"]}}),
        ("DELETE", f"/v1/adapters/{model}", {}),
        ("DELETE", f"/v1/adapters/{model}", {"params": {"version": 1}}),
        ("DELETE", f"/adapters/{model}", {}),
        ("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": model}}),
        ("GET", f"/v1/adapters/{model}/inspect", {}),
        ("GET", f"/v1/adapters/{model}/inspect", {"params": {"intruders": True}}),
        ("GET", "/v1/adapters/sql/inspect", {"params": {"against": model}}),
        ("POST", "/v1/merged", {"json": {"name": "copy", "from": [{"name": model}]}}),
        ("POST", "/v1/merged", {"json": {"name": "copy", "from": [{"name": model}], "materialise": True}}),
        ("POST", "/v1/merged", {"json": {"name": "copy", "from": [{"name": "sql"}, {"name": f"{model}@1"}]}}),
    ]


def test_what_is_shared_is_asked_by_whose_it_is(shared: Running, keys: dict[str, str]) -> None:
    client = shared.client
    for model in ("acme~sql", "default~law"):
        for url, body in asked(model):
            answer = client.post(url, json=body)
            assert answer.status_code == 200, (url, body, answer.text)
        answer = shared.generate(model, PROMPT)
        assert answer.headers["x-swaplora-adapter"].startswith(f"{model}@")
        assert answer.json()["model"] == model
    alone = shared.token_ids("acme~sql", PROMPT)
    assert shared.generate("sql", PROMPT).headers["x-swaplora-adapter"] == "sql@1"  # its own
    become(shared, keys["acme"])
    assert alone == shared.token_ids("sql", PROMPT) == shared.token_ids("acme~sql", PROMPT)


def test_it_is_in_every_list_of_whom_it_is_shared_with_and_of_no_one_else(
    shared: Running, keys: dict[str, str]
) -> None:
    for tenant, told in (
        ("zeta", ["acme~sql", "default~law", "sql"]),
        ("my-zeta", ["default~law"]),
        ("acme", ["default~law", "mine", "sql"]),
        ("default", ["law"]),
        ("admin", ["law"]),
    ):
        client = become(shared, keys[tenant])
        assert names(client) == told
        assert models(client) == [BASE, *told, *(["prod"] if tenant == "acme" else [])]
        assert [one["path"] for one in client.get("/lora-adapters").json()] == told
        paged, after = [], ""
        while page := client.get("/v1/adapters", params={"limit": 1, "after": after}).json()["data"]:
            paged.append(after := page[0]["name"])
        assert paged == told


def test_a_card_tells_whom_it_is_shared_with_what_can_be_asked_and_no_more(
    shared: Running, keys: dict[str, str]
) -> None:
    card = shared.client.get("/v1/adapters/acme~sql").json()
    assert (card["name"], card["version"], [each["version"] for each in card["versions"]]) == ("acme~sql", 2, [1, 2])
    assert card["source"] == "shared"
    hidden = ("in_flight", "last_used", "last_failure", "provenance", "shared_with")
    assert [card[key] for key in hidden] == [None] * len(hidden)
    own = become(shared, keys["acme"]).get("/v1/adapters/acme~sql").json()
    assert (own["name"], own["source"], own["shared_with"], own["digest"]) == (
        "sql",
        "upload",
        ["zeta"],
        card["digest"],
    )
    assert own["in_flight"] == 0
    assert become(shared, keys["acme"]).get("/v1/adapters/mine").json()["shared_with"] == []


def test_whom_it_is_shared_with_does_nothing_else_with_it(shared: Running, keys: dict[str, str]) -> None:
    for model in ("acme~sql", "default~law"):
        for method, url, fields in other_things(model):
            answer = shared.client.request(method, url, **fields)
            assert answer.status_code == 403, (method, url, answer.text)
            assert f"{model} is shared with this tenant" in answer.text
    become(shared, keys["acme"])
    assert names(shared.client) == ["default~law", "mine", "sql"]
    assert shared.client.get("/v1/adapters/sql").json()["version"] == 2


def test_nothing_is_stored_under_anothers_name(shared: Running, adapters: list[Path]) -> None:
    for model in ("acme~sql", "acme~new", "zeta~new"):
        assert error(shared.put(model, adapters[6])) == (400, "invalid_adapter_name")
        answer = shared.client.put(f"/v1/aliases/{model}", json={"target": "sql"})
        assert error(answer) == (400, "invalid_adapter_name")
        answer = shared.client.post("/v1/merged", json={"name": model, "from": [{"name": "sql"}]})
        assert error(answer) == (400, "invalid_adapter_name")


@pytest.mark.parametrize("tenant", ["my-zeta", "default", "admin"])
@pytest.mark.parametrize(("theirs", "nobodys"), [("acme~sql", "acme~nope"), ("acme~prod", "acme~nope")])
def test_whom_it_is_not_shared_with_cannot_tell_it_from_what_nobody_has(
    shared: Running, keys: dict[str, str], tenant: str, theirs: str, nobodys: str
) -> None:
    client = become(shared, keys[tenant])
    requests = [("POST", url, {"json": body}) for url, body in asked(theirs)] + other_things(theirs)
    requests.append(("PUT", "/v1/aliases/mine", {"json": {"target": theirs}}))
    requests.append(("GET", f"/v1/models/{theirs}", {}))
    requests.append(("POST", f"/v1/adapters/{theirs}/warm", {}))
    for method, url, fields in requests:
        one = client.request(method, url, **fields)
        nobody = json.loads(json.dumps(fields).replace(theirs, nobodys))
        other = client.request(method, url.replace(theirs, nobodys), **nobody)
        assert one.status_code == other.status_code >= 400, (method, url, one.text)
        assert one.text.replace(theirs, nobodys) == other.text


@pytest.mark.parametrize("scope", [GENERATE, READ, WRITE])
def test_scopes_are_what_they_were(shared: Running, keys: dict[str, str], scope: KeyScope) -> None:
    client = become(shared, keys[f"zeta {scope}"])
    for (method, url, fields), of in (
        (("GET", "/v1/adapters/acme~sql", {}), {READ}),
        (("GET", "/v1/models/acme~sql", {}), {READ, GENERATE}),
        (("POST", "/v1/completions", {"json": {"model": "acme~sql", "prompt": PROMPT, "max_tokens": 1}}), {GENERATE}),
        (("POST", "/v1/adapters/acme~sql/warm", {}), {WRITE}),
        (("PUT", "/v1/aliases/theirs", {"json": {"target": "acme~sql"}}), {WRITE}),
    ):
        answer = client.request(method, url, **fields)
        assert answer.status_code == (200 if scope in of else 403), (method, url, answer.text)
    become(shared, keys["zeta"]).delete("/v1/aliases/theirs")


def test_what_is_shared_no_more_is_as_if_it_had_gone(shared: Running, keys: dict[str, str]) -> None:
    client = shared.client
    assert (
        client.put("/v1/aliases/theirs", json={"target": "acme~sql@1"}).json()["targets"][0]["target"] == "acme~sql@1"
    )
    assert shared.generate("theirs", PROMPT).headers["x-swaplora-adapter"] == "acme~sql@1"
    assert "theirs" in models(client)
    share(shared, keys["acme"], "sql")
    client = become(shared, keys["zeta"])
    for url, body in asked("acme~sql"):
        assert client.post(url, json=body).status_code == 404
    refused = shared.generate("theirs", PROMPT)
    assert error(refused) == (404, "model_not_found")
    assert "'theirs'" in refused.text
    assert "'acme~sql'" in refused.text
    assert "theirs" not in models(client)
    assert client.get("/v1/models/theirs").status_code == 404
    assert client.get("/v1/aliases/theirs").json()["targets"][0]["target"] == "acme~sql@1"  # its own words
    share(shared, keys["acme"], "sql", "zeta")
    become(shared, keys["zeta"])
    assert shared.generate("theirs", PROMPT).headers["x-swaplora-adapter"] == "acme~sql@1"
    assert client.delete("/v1/aliases/theirs").status_code == 200


def test_a_stream_that_runs_ends_on_what_it_holds(shared: Running, keys: dict[str, str]) -> None:
    become(shared, keys["zeta"])
    whole = shared.token_ids("acme~sql", PROMPT, 200, ignore_eos=True)
    body = {"model": "acme~sql", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "stream": True}
    body |= {"return_token_ids": True, "ignore_eos": True}
    with shared.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        told = [next(lines)]
        share(shared, keys["acme"], "sql")
        become(shared, keys["zeta"])
        assert shared.generate("acme~sql", PROMPT).status_code == 404
        told += lines
    chunks = [json.loads(line.removeprefix("data: ")) for line in told if line.startswith("data: {")]
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids") or ()] == whole


def test_its_owner_deletes_it_whoever_has_an_alias_for_it(
    server: Running, keys: dict[str, str], adapters: list[Path]
) -> None:
    become(server, keys["acme"])
    assert server.put("short", adapters[6]).status_code == 201
    share(server, keys["acme"], "short", "*")
    client = become(server, keys["zeta"])
    assert client.put("/v1/aliases/theirs", json={"target": "acme~short"}).status_code == 200
    client = become(server, keys["acme"])
    assert client.delete("/v1/adapters/short").json()["state"] == "deleted"
    assert server.put("short", adapters[6]).status_code == 201  # another one, which nobody has shared
    assert client.get("/v1/adapters/short").json()["shared_with"] == []
    become(server, keys["zeta"])
    assert error(server.generate("theirs", PROMPT)) == (404, "model_not_found")
    assert client.delete("/v1/aliases/theirs").status_code == 200
    assert become(server, keys["acme"]).delete("/v1/adapters/short").status_code == 200


def test_tenants_share_no_blocks_of_a_shared_adapter(shared: Running, keys: dict[str, str]) -> None:
    prompt = list(range(20, 80))

    def cached(tenant: str, model: str) -> int:
        become(shared, keys[tenant])
        usage = shared.generate(model, prompt, 1).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached("acme", "sql"), cached("zeta", "acme~sql")] == [0, 0]
    assert cached("acme", "sql") >= 32
    assert cached("zeta", "acme~sql") >= 32


def test_metrics_count_it_under_the_name_that_it_is_stored_as(shared: Running, keys: dict[str, str]) -> None:
    shared.token_ids("acme~sql", PROMPT)
    shared.token_ids("default~law", PROMPT)
    text = become(shared, keys["admin"]).get("/metrics").text
    counted = {
        line.split('"')[1] for line in text.splitlines() if line.startswith("swaplora_adapter_generations_total{")
    }
    assert {"acme~sql", "law"} <= counted
    assert "default~law" not in text


def test_the_audit_log_says_with_whom(shared: Running, config: Settings, keys: dict[str, str]) -> None:
    shared.client.patch("/v1/adapters/acme~sql", json={"shared_with": ["*"]})
    assert config.audit_log is not None
    *_, last = map(json.loads, config.audit_log.read_text().splitlines())
    told = ("tenant", "change", "name", "outcome", "shared_with")
    assert [last[key] for key in told] == ["zeta", "adapter.share", "acme~sql", "not_owner", ["*"]]
    share(shared, keys["acme"], "sql", "zeta", "default")
    *_, last = map(json.loads, config.audit_log.read_text().splitlines())
    assert [last[key] for key in told] == ["acme", "adapter.share", "sql", "done", ["zeta", "default"]]


@pytest.mark.parametrize(
    ("tenants", "word"),
    [
        (["Zeta"], "shared_with"),
        (["zeta", "zeta"], "twice"),
        (["*", "zeta"], "everybody"),
        (["zeta~x"], "shared_with"),
        ([""], "shared_with"),
        (["zeta\n"], "shared_with"),
        (["a"] * 1001, "shared_with"),
        (["a" * 64], "shared_with"),
        ("zeta", "shared_with"),
        ({}, "shared_with"),
        ([1], "shared_with"),
    ],
)
def test_a_list_that_is_none_changes_nothing(shared: Running, keys: dict[str, str], tenants: object, word: str) -> None:
    answer = become(shared, keys["acme"]).patch("/v1/adapters/sql", json={"shared_with": tenants})
    assert error(answer) == (400, "invalid_request")
    assert word in answer.text
    assert shared.client.get("/v1/adapters/sql").json()["shared_with"] == ["zeta"]


def test_the_client_shares(server: Running, keys: dict[str, str]) -> None:
    with Client(server.url, keys["acme"]) as client:
        assert client.share_adapter("mine", ["zeta"])["shared_with"] == ["zeta"]
        with Client(server.url, keys["zeta"]) as other:
            assert other.adapter("acme~mine")["name"] == "acme~mine"
        assert client.share_adapter("mine", [])["shared_with"] == []


def test_it_stays_so_over_replaces_and_restarts(
    config: Settings, adapters: list[Path], keys: dict[str, str], tmp_path: Path
) -> None:
    config = config.model_copy(update={"data_dir": tmp_path / "data", "audit_log": None})
    for is_lost in (False, True):
        if is_lost:
            (tmp_path / "data" / "catalogue.sqlite3").unlink()  # what the files say is enough
        with serving(config) as server:
            become(server, keys["acme"])
            if not is_lost:
                server.put("sql", adapters[1])
                share(server, keys["acme"], "sql", "zeta")
                assert server.put("sql", adapters[2]).json()["shared_with"] == ["zeta"]
                become(server, keys["zeta"]).put("/v1/aliases/theirs", json={"target": "acme~sql"})
            become(server, keys["zeta"])
            assert server.generate("theirs", PROMPT).headers["x-swaplora-adapter"] == "acme~sql@2"
            assert names(become(server, keys["default"])) == []


def test_no_request_is_admitted_after_the_answer_that_it_is_shared_no_more(
    server: Running, keys: dict[str, str]
) -> None:
    """Each answer of a borrower is begun while it was shared: told by what it saw before and after."""
    seen: list[tuple[int, int, int]] = []
    epoch = [0]  # odd: it is certainly not shared
    is_over = threading.Event()

    def ask() -> None:
        body = {"model": "acme~mine", "prompt": PROMPT, "max_tokens": 1}
        with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {keys['zeta']}"}) as client:
            while not is_over.is_set():
                before = epoch[0]
                status = client.post("/v1/completions", json=body).status_code
                seen.append((before, status, epoch[0]))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        share(server, keys["acme"], "mine", "zeta")
        share(server, keys["acme"], "mine")
        epoch[0] += 1
        shown = len(seen)
        while len(seen) < shown + 4:
            is_over.wait(0.001)
        epoch[0] += 1
    is_over.set()
    for thread in threads:
        thread.join()
    certain = [status for before, status, after in seen if before == after and before % 2]
    assert set(certain) == {404}


def test_names_of_the_stored_are_not_those_of_others() -> None:
    """A tenant's name that ends as another's does is whole in what the other is told."""
    assert Naming("zeta").unsaid("there is no adapter called 'my-zeta~sql', nor 'zeta~x'") == (
        "there is no adapter called 'my-zeta~sql', nor 'x'"
    )
