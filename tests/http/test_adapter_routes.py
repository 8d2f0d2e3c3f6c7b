"""What the adapter routes refuse rather than guess at."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import Running, serving, settings


@pytest.fixture(scope="module")
def stocked(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with `sql` in two versions, and a split between them."""
    with serving(settings(base, tmp_path_factory.mktemp("data"))) as running:
        for adapter in adapters[1:3]:
            running.put("sql", adapter)
        targets = [{"target": f"sql@{version}", "weight": 1} for version in (1, 2)]
        assert running.client.put("/v1/aliases/split", json={"targets": targets}).status_code == 200
        yield running


@pytest.mark.parametrize(
    ("method", "path", "parameter"),
    [
        ("DELETE", "/v1/adapters/sql?versoin=1", "versoin"),
        ("DELETE", "/v1/adapters/sql?version=1&force=true", "force"),
        ("GET", "/v1/adapters?stat=stored", "stat"),
        ("GET", "/v1/adapters/sql?version=1", "version"),
        ("POST", "/v1/adapters/sql/warm?version=1", "version"),
        ("PUT", "/v1/adapters/sql?convrt=svd", "convrt"),
    ],
)
def test_a_query_parameter_that_the_route_does_not_take_is_refused(
    stocked: Running, method: str, path: str, parameter: str
) -> None:
    answer = stocked.client.request(method, path)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", parameter)
    assert parameter in error["message"]
    assert len(stocked.client.get("/v1/adapters/sql").json()["versions"]) == 2


def test_a_query_parameter_that_comes_twice_is_refused(stocked: Running) -> None:
    answer = stocked.client.get("/v1/adapters?after=a&limit=5&after=b")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")


def test_those_that_it_takes_are_taken(stocked: Running) -> None:
    listed = stocked.client.get("/v1/adapters?limit=5&after=a&state=stored")
    assert [card["name"] for card in listed.json()["data"]] == ["sql"]


def test_a_state_that_there_is_not_is_refused(stocked: Running) -> None:
    for state in ("stored", "loading", "resident", "draining", "failed"):
        assert stocked.client.get("/v1/adapters", params={"state": state}).status_code == 200
    for state in ("bogus", "", "Stored"):
        answer = stocked.client.get("/v1/adapters", params={"state": state})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "state")


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON", "application/json; charset=utf-8", "APPLICATION/JSON ;x=y"]
)
def test_json_is_known_however_it_is_written(stocked: Running, content_type: str) -> None:
    body, headers = json.dumps({"source": "hf://org/repo"}), {"Content-Type": content_type}
    answer = stocked.client.put("/v1/adapters/sql", content=body, headers=headers)
    assert answer.json()["error"]["code"] == "source_not_allowed"


@pytest.mark.parametrize("content_type", ["application/jsonl", "application/json-seq", "text/json"])
def test_what_only_looks_like_json_is_not(stocked: Running, content_type: str) -> None:
    answer = stocked.client.put("/v1/adapters/sql", content="{}", headers={"Content-Type": content_type})
    assert "multipart/form-data" in answer.json()["error"]["message"]


def test_an_alias_is_not_warmed(stocked: Running) -> None:
    for name in ("split", "base:split"):
        answer = stocked.client.post(f"/v1/adapters/{name}/warm")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")
    assert stocked.client.get("/v1/adapters/sql").json()["state"] == "stored"
    assert stocked.client.post("/v1/adapters/sql@1/warm").status_code == 200
