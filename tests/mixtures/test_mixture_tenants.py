"""Mixtures of tenants: each has its own, of what it may ask; what is shared no more is lost by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny
from serving import BASE, Running, serving, settings
from swaplora_adapters.registry import names
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key
from swaplora_server.http.mixtures import routes
from swaplora_server.service.mixtures.traces import trace

PROMPT = [5, 6, 7, 8, 9]
ALL = (KeyScope.GENERATE, KeyScope.READ, KeyScope.WRITE)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("members")
    return [tiny.save_adapter(folder / str(seed), base, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    made = {tenant: create_key(file, tenant, ALL)[0] for tenant in ("acme", "zeta", "default")}
    made["reader"] = create_key(file, "acme", (KeyScope.READ,))[0]
    return {"file": str(file)} | made


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def shared(
    base: Path, folders: list[Path], keys: dict[str, str], audit: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """acme and zeta have `a` and `b`, zeta's own; acme mixes its as `mix`."""
    config = settings(base, tmp_path_factory.mktemp("data"), key_file=keys["file"], audit_log=audit)
    with serving(config) as server:
        for tenant, numbers in (("acme", (0, 1)), ("zeta", (1, 2))):
            become(server, keys[tenant])
            for name, number in zip("ab", numbers, strict=True):
                assert server.put(name, folders[number]).status_code == 201
        become(server, keys["acme"])
        assert make(server, "mix", ["a", "b"]).status_code == 201
        yield server


def become(server: Running, key: str) -> httpx.Client:
    server.client.headers["authorization"] = f"Bearer {key}"
    return server.client


def make(server: Running, name: str, members: list[str], top_k: int = 1) -> httpx.Response:
    return server.client.post("/v1/mixtures", json={"name": name, "members": members, "top_k": top_k})


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_what_another_has_is_what_nobody_has(shared: Running, keys: dict[str, str]) -> None:
    for tenant in ("zeta", "default"):
        client = become(shared, keys[tenant])
        assert client.get("/v1/mixtures").json()["data"] == []
        assert "mix" not in [model["id"] for model in client.get("/v1/models").json()["data"]]
        for name in ("mix", "acme~mix"):
            assert error_of(client.get(f"/v1/mixtures/{name}"))["code"] == "mixture_not_found"
            assert error_of(client.delete(f"/v1/mixtures/{name}"))["code"] == "mixture_not_found"
            assert error_of(client.get(f"/v1/models/{name}"))["code"] == "model_not_found"
            assert error_of(shared.generate(name, PROMPT))["code"] == "model_not_found"
            traced = client.post(f"/v1/mixtures/{name}/trace", json={"prompt": PROMPT})
            assert error_of(traced)["code"] == "mixture_not_found"
    client = become(shared, keys["acme"])
    assert [made["name"] for made in client.get("/v1/mixtures").json()["data"]] == ["mix"]
    assert client.get("/v1/mixtures/mix").json()["members"] == ["a", "b"]
    assert shared.generate("mix", PROMPT).headers["x-swaplora-adapter"] == "a@1, b@1"


def test_one_name_is_two_mixtures(shared: Running, keys: dict[str, str]) -> None:
    become(shared, keys["acme"])
    mine = shared.token_ids("mix", PROMPT, 16)
    client = become(shared, keys["zeta"])
    assert make(shared, "mix", ["b", "a"]).status_code == 201
    assert shared.token_ids("mix", PROMPT, 16) != mine
    assert client.delete("/v1/mixtures/mix").status_code == 200
    become(shared, keys["acme"])
    assert shared.token_ids("mix", PROMPT, 16) == mine


def test_a_member_may_be_anothers_as_long_as_it_is_shared(
    shared: Running, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = become(shared, keys["zeta"])
    error = error_of(make(shared, "theirs", ["a", "acme~a"]))
    assert (error["code"], error["param"]) == ("adapter_not_found", "members")
    error = error_of(make(shared, "theirs", ["a", "b@9"]))
    assert (error["code"], error["param"]) == ("version_not_found", "members")
    become(shared, keys["acme"]).patch("/v1/adapters/a", json={"shared_with": ["zeta"]})
    become(shared, keys["zeta"])
    assert make(shared, "theirs", ["a", "acme~a"]).status_code == 201
    assert client.get("/v1/mixtures/theirs").json()["members"] == ["a", "acme~a"]
    assert shared.generate("theirs", PROMPT).headers["x-swaplora-adapter"] == "a@1, acme~a@1"
    traced = client.post("/v1/mixtures/theirs/trace", json={"prompt": PROMPT})  # which would tell the weights
    assert (traced.status_code, error_of(traced)["code"]) == (403, "not_owner")
    monkeypatch.setattr(routes, "_check_own", lambda _service, _name: None)  # as if it had changed since
    traced = client.post("/v1/mixtures/theirs/trace", json={"prompt": PROMPT})
    assert (traced.status_code, error_of(traced)["code"]) == (403, "not_owner")
    become(shared, keys["acme"]).patch("/v1/adapters/a", json={"shared_with": []})
    become(shared, keys["zeta"])
    lost = error_of(shared.generate("theirs", PROMPT))
    assert lost["code"] == "model_not_found"
    assert "'theirs' has lost a member" in lost["message"]
    assert "acme~a" in lost["message"]
    assert "theirs" not in [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert client.delete("/v1/mixtures/theirs").status_code == 200


def test_a_name_that_is_no_mixture_by_then_has_no_trace(
    shared: Running, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = become(shared, keys["acme"])
    monkeypatch.setattr(routes, "trace", lambda service, _name, ids: trace(service, "a", ids))
    traced = client.post("/v1/mixtures/mix/trace", json={"prompt": PROMPT})
    assert (traced.status_code, error_of(traced)["code"]) == (404, "mixture_not_found")


def test_a_tenant_may_have_so_many_aliases_and_mixtures(
    shared: Running, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    become(shared, keys["acme"])
    monkeypatch.setattr(names, "MAX_ALIASES", 2)
    client = become(shared, keys["zeta"])
    assert client.put("/v1/aliases/one", json={"target": "a"}).status_code == 200
    assert make(shared, "two", ["a", "b"]).status_code == 201
    for more in (make(shared, "three", ["a", "b"]), client.put("/v1/aliases/three", json={"target": "a"})):
        assert (more.status_code, error_of(more)["code"]) == (429, "quota_exceeded")
        assert "2 aliases and mixtures" in error_of(more)["message"]
    assert make(shared, "two", ["b", "a"]).status_code == 200
    assert client.put("/v1/aliases/one", json={"target": "b"}).status_code == 200
    assert client.delete("/v1/mixtures/two").status_code == client.delete("/v1/aliases/one").status_code == 200


def test_a_key_that_may_not_write_makes_none(shared: Running, keys: dict[str, str]) -> None:
    client = become(shared, keys["reader"])
    assert error_of(make(shared, "more", ["a", "b"]))["code"] == "insufficient_scope"
    assert error_of(client.delete("/v1/mixtures/mix"))["code"] == "insufficient_scope"
    assert client.get("/v1/mixtures/mix").status_code == 200
    traced = client.post("/v1/mixtures/mix/trace", json={"prompt": PROMPT})
    assert error_of(traced)["code"] == "insufficient_scope"


def test_what_the_base_is_called_is_no_mixture_of_anybodys(shared: Running, keys: dict[str, str]) -> None:
    become(shared, keys["zeta"])
    assert error_of(make(shared, BASE, ["a", "b"]))["code"] == "invalid_adapter_name"
    assert error_of(make(shared, "a", ["a", "b"]))["code"] == "invalid_adapter_name"


def test_changes_are_in_the_audit_log(shared: Running, keys: dict[str, str], audit: Path) -> None:
    client = become(shared, keys["acme"])
    make(shared, "noted", ["a", "b"])
    client.delete("/v1/mixtures/noted")
    client.delete("/v1/mixtures/noted")
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    told = [(one["tenant"], one["change"], one["outcome"]) for one in lines if one["name"] == "noted"]
    assert told == [
        ("acme", "mixture.put", "done"),
        ("acme", "mixture.delete", "done"),
        ("acme", "mixture.delete", "mixture_not_found"),
    ]
