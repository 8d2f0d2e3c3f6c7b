"""Two replicas of their own state, asked as one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from pydantic_core import from_json, to_json

from fronts import Front, front_of
from metering import Remote
from serving import BASE, Running, serving, settings
from swaplora_server.access.key_file import digest_of
from swaplora_server.access.key_ring import KeyRing
from swaplora_server.cluster.exchange import Answer
from swaplora_server.cluster.gathered import gathered_as, is_page, labelled, missing
from swaplora_server.cluster.meter import CommonMeter, SharedMeter
from swaplora_server.http.app import create_app
from swaplora_server.http.transport.body_memory import BodyMemory


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Running]]:
    configs = [settings(base, tmp_path_factory.mktemp("data")) for _ in range(2)]
    with serving(configs[0]) as first, serving(configs[1]) as second:
        yield first, second


@pytest.fixture(scope="module")
def front(two: tuple[Running, Running]) -> Iterator[Front]:
    apps = [create_app(running.service, BodyMemory(1 << 20)) for running in two]
    with front_of(two[0].service.settings, *apps) as found:
        yield found


def evaluation(front: Front, at: str) -> str:
    task = [{"prompt": "a", "answer": "b"}]
    front.engines.chosen = at
    answer = front.client.post("/v1/evaluations", json={"models": [BASE], "task": task, "max_tokens": 1})
    front.engines.chosen = "r0"
    assert answer.status_code == 201, answer.text
    found: str = answer.json()["id"]
    return found


def test_what_one_replica_has_is_found_whichever_it_is(front: Front) -> None:
    ids = [evaluation(front, at) for at in ("r0", "r1", "r0", "r1")]

    def listed(query: str = "") -> Any:
        return front.client.get(f"/v1/evaluations{query}").json()

    assert [one["id"] for one in listed()["data"]] == ids[::-1]
    first = listed("?limit=2")
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (ids[:1:-1], True)
    assert [one["id"] for one in listed(f"?limit=2&after={ids[2]}")["data"]] == [ids[1], ids[0]]
    assert front.client.get("/v1/evaluations?after=nobody").status_code == 404
    assert front.client.get("/v1/evaluations?limit=0").status_code == 400
    for each in ids:
        assert front.client.get(f"/v1/evaluations/{each}").json()["id"] == each
        assert front.client.post(f"/v1/evaluations/{each}/cancel").status_code == 200
        assert front.client.delete(f"/v1/evaluations/{each}").status_code == 200
        assert front.client.get(f"/v1/evaluations/{each}").status_code == 404
    assert listed()["data"] == []


def test_an_adapter_on_its_way_is_found_where_it_is(
    two: tuple[Running, Running], front: Front, adapters: list[Path]
) -> None:
    assert two[1].put("late", adapters[0]).status_code == 201
    assert front.client.get("/v1/adapters/late").json()["name"] == "late"
    assert front.client.head("/v1/adapters/late").status_code == 200
    assert front.client.delete("/v1/adapters/late").status_code in (200, 202)
    assert front.client.get("/v1/adapters/late").status_code == 404


def test_metrics_are_each_replicas(two: tuple[Running, Running], front: Front) -> None:
    front.client.post("/v1/completions", json={"model": BASE, "prompt": "a", "max_tokens": 2})
    answer = front.client.get("/metrics")
    assert answer.headers["content-type"] == two[0].client.get("/metrics").headers["content-type"]
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    own = {family.name: family for family in text_string_to_metric_families(two[0].client.get("/metrics").text)}
    assert families.keys() == own.keys()
    assert all(families[name].type == own[name].type for name in own)
    told = {sample.labels["replica"] for family in families.values() for sample in family.samples}
    assert told == {"r0", "r1"}
    openmetrics = front.client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert openmetrics.text.endswith("# EOF\n")
    found = {family.name: family.type for family in openmetrics_families(openmetrics.text)}  # type: ignore[no-untyped-call]
    own_text = two[0].client.get("/metrics", headers={"accept": "application/openmetrics-text"}).text
    assert found == {family.name: family.type for family in openmetrics_families(own_text)}  # type: ignore[no-untyped-call]
    assert found["swaplora_generations"] == "counter"
    assert found["vllm:request_prompt_tokens"] == "histogram"


def test_what_all_are_asked_counts_once(
    two: tuple[Running, Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key whose limits have room for one request gets all of what they have to say."""
    file, key = tmp_path / "keys.yaml", "sk-few"
    own = {"id": "few", "sha256": digest_of(key), "limits": {"requests_per_minute": 5}}
    file.write_bytes(to_json({"keys": [{**own, "scopes": ["metrics:read", "adapters:read", "generate"]}]}))
    meter = Remote(CommonMeter())
    for name, running in zip("ab", two, strict=True):
        monkeypatch.setattr(running.service, "keys", KeyRing([], file))
        monkeypatch.setattr(running.service, "meter", SharedMeter(name, lambda: meter))
    apps = [create_app(running.service, BodyMemory(1 << 20)) for running in two]
    with front_of(two[0].service.settings.model_copy(update={"key_file": file}), *apps) as front:
        front.client.headers["authorization"] = f"Bearer {key}"
        assert front.client.get("/v1/evaluations").json()["data"] == []
        assert front.client.get("/v1/evaluations?limit=5.0").json()["has_more"] is False
        assert {'replica="r0"', 'replica="r1"'} == set(re.findall('replica="r."', front.client.get("/metrics").text))
        asked = [front.client.get("/v1/adapters/nobody").status_code for _ in range(3)]
        assert asked == [404, 404, 429]
        assert front.client.get("/metrics").status_code == 429
        assert front.client.get("/v1/evaluations").status_code == 429


def test_a_list_without_one_of_them_is_none() -> None:
    """And metrics of those that can answer are; but a limit is a limit."""
    body = to_json({"object": "list", "data": [], "has_more": False})
    good, limited = Answer("a", 200, [(b"content-type", b"application/json")], body), Answer("b", 429, [], b"limited")

    def found(path: str, *answers: Answer) -> int:
        how = gathered_as("GET", path)
        assert how is not None
        scope = {"type": "http", "query_string": b"limit=3", "headers": []}
        assert not is_page([*answers], scope, how)
        return how([*answers], scope).status

    lists, metrics = "/v1/evaluations", "/metrics"
    assert [found(lists, good, missing()), found(lists, good, limited)] == [503, 429]
    assert [found(metrics, good, missing()), found(metrics, good, limited)] == [200, 429]


def test_metrics_are_put_together_as_they_are() -> None:
    """Every sample of every replica once, with its label, whatever stands in a label or in a description."""
    answers, wanted = [], set()
    for name, extra in (("a", "only_here"), ("b", "only_there"), ("c", "only_here")):
        registry = CollectorRegistry()
        told = Gauge("told", "# HELP other \n told{x} 1", ["path"], registry=registry)
        for number, path in enumerate(('x{a="b"} 1', "# HELP told no", "line\nline", 'a"b', "replica")):
            told.labels(path).set(number)
        Gauge("bare", "no labels", registry=registry).set(3)
        Gauge("nothing", "of which there is none", ["x"], registry=registry)
        Counter(extra, "of some alone", registry=registry).inc()
        headers = [(b"content-type", CONTENT_TYPE_PLAIN_0_0_4.encode())]
        answers.append(labelled(Answer(name, 200, headers, generate_latest(registry))))
        for family in registry.collect():
            wanted |= {(s.name, *sorted({**s.labels, "replica": name}.items()), s.value) for s in family.samples}
    how = gathered_as("GET", "/metrics")
    assert how is not None
    body = how([*answers, Answer("d", 503, [], b"")], {"type": "http", "headers": []}).body.decode()
    families = [*text_string_to_metric_families(body)]
    found = [(s.name, *sorted(s.labels.items()), s.value) for family in families for s in family.samples]
    assert len(found) == len(set(found))
    assert set(found) == wanted
    names = [family.name for family in families]
    assert len(names) == len(set(names))


def test_a_list_goes_on_where_it_ended() -> None:
    """Whoever asks for no number has the newest hundred of all replicas, and then the others."""
    lists = [
        [{"id": f"{name}{at}", "created": at + more} for at in range(90, 0, -1)]
        for name, more in (("a", 100), ("b", 0))
    ]
    body = [to_json({"object": "list", "data": data, "has_more": False}) for data in lists]
    answers = [
        Answer(name, 200, [(b"content-type", b"application/json")], each) for name, each in zip("ab", body, strict=True)
    ]
    how = gathered_as("GET", "/v1/evaluations")
    assert how is not None

    def listed(query: str) -> tuple[list[str], bool]:
        scope = {"type": "http", "query_string": query.encode(), "headers": []}
        assert is_page(answers, scope, how) == bool(query)
        told = from_json(how(answers, scope).body)
        return [one["id"] for one in told["data"]], told["has_more"]

    first, has_more = listed("")
    rest, has_still_more = listed(f"after={first[-1]}")
    assert first + rest == [one["id"] for data in lists for one in data]
    assert (len(first), has_more, has_still_more) == (100, True, False)


def test_the_whole_is_ready_while_one_is(two: tuple[Running, Running], front: Front) -> None:
    for path in ("/health", "/health/ready", "/ping"):
        assert front.client.get(path).status_code == 200
    two[0].service.is_draining = True
    try:
        assert front.client.get("/health/ready").json() == {"ready": True}
        two[1].service.is_draining = True
        assert front.client.get("/health/ready").status_code == 503
    finally:
        two[0].service.is_draining = two[1].service.is_draining = False
    front.engines.replicas, kept = {}, front.engines.replicas
    try:
        answer = front.client.get("/health/ready")
    finally:
        front.engines.replicas = kept
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
