"""GET /metrics: what Prometheus's own parser reads there is what happened, with labels that nobody can multiply."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from serving import BASE, Running, serving, settings
from swaplora_server.engine.snapshot import Snapshot
from swaplora_server.kernels.step import StepForm
from swaplora_server.service.metrics import GenerationRecord, Metrics, Outcome, ServerState
from swaplora_server.service.service import Service

PROMPT = list(range(30, 50))
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """(name, labels) → value of everything in Prometheus's text format."""
    found = [sample for family in parse_text(text) for sample in family.samples]
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in found}


def scrape(server: Running) -> Samples:
    answer = server.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return samples(answer.text)


def value(of: Samples, name: str, **labels: str) -> float:
    return of.get((f"swaplora_{name}", tuple(sorted(labels.items()))), 0.0)


def change(before: Samples, after: Samples, name: str, **labels: str) -> float:
    return value(after, name, **labels) - value(before, name, **labels)


def test_a_generation_is_counted_once_however_it_is_answered(server: Running) -> None:
    before = scrape(server)
    for is_streaming in (True, False):
        server.generate(BASE, PROMPT, max_tokens=5, n=2, ignore_eos=True, stream=is_streaming)
    after = scrape(server)
    assert change(before, after, "requests_total", route="/v1/completions", status="2xx") == 2
    assert change(before, after, "generations_total", outcome="completed") == 2
    assert change(before, after, "generations_total", outcome="abandoned") == 0
    assert change(before, after, "prompt_tokens_total") == 2 * len(PROMPT)
    assert change(before, after, "generated_tokens_total") == 2 * 2 * 5
    for name in ("time_to_first_token", "time_per_output_token", "request_duration"):
        assert change(before, after, f"{name}_seconds_count") == 2
        assert change(before, after, f"{name}_seconds_bucket", le="+Inf") == 2
        assert change(before, after, f"{name}_seconds_sum") > 0
    assert value(after, "time_to_first_token_seconds_sum") <= value(after, "request_duration_seconds_sum")


def test_one_token_has_no_time_between_tokens(server: Running) -> None:
    before = scrape(server)
    server.token_ids(BASE, PROMPT, max_tokens=1)
    after = scrape(server)
    assert change(before, after, "time_to_first_token_seconds_count") == 1
    assert change(before, after, "time_per_output_token_seconds_count") == 0


def test_the_engine_and_the_memory_are_shown_as_they_are(server: Running, adapters: list[Path]) -> None:
    server.put("measured", adapters[2])
    server.token_ids("measured", PROMPT)
    server.wait_idle()
    found = scrape(server)
    assert (value(found, "running_sequences"), value(found, "waiting_sequences")) == (0, 0)
    assert value(found, "kv_blocks") == value(found, "kv_blocks_free") == server.service.engine.snapshot().num_blocks
    assert value(found, "adapter_resident_bytes") == server.service.registry.resident_bytes > 0
    assert found["process_resident_memory_bytes", ()] > 1 << 20
    assert value(found, "info", base=BASE, version=server.client.get("/version").json()["version"]) == 1
    server.client.delete("/v1/adapters/measured")


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/v1/models/nobody", "/v1/models/{model:path}", "4xx"),
        ("GET", "/v1/adapters/nobody", "/v1/adapters/{name}", "4xx"),
        ("POST", "/v1/completions", "/v1/completions", "4xx"),
        ("GET", "/no/such/page", "none", "4xx"),
        ("GET", "/health", "/health", "2xx"),
    ],
)
def test_a_request_is_counted_under_its_route_and_never_under_what_it_names(
    server: Running, method: str, path: str, route: str, status: str
) -> None:
    before = scrape(server)
    server.client.request(method, path, json={"model": "some-name"} if method == "POST" else None)
    after = scrape(server)
    assert change(before, after, "requests_total", route=route, status=status) == 1
    labels = {text for _name, pairs in after for _label, text in pairs}
    assert not any("nobody" in text or "some-name" in text or "such" in text for text in labels)


def test_an_error_in_a_stream_is_a_failed_generation(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(settings(base, tmp_path)) as server:
        before = scrape(server)
        monkeypatch.setattr(server.service.engine._runner, "run", lambda _batch: 1 / 0)  # noqa: SLF001
        monkeypatch.setattr("swaplora_server.engine.engine._log.exception", lambda *_args, **_fields: None)
        answer = server.client.post("/v1/completions", json={"model": BASE, "prompt": PROMPT, "stream": True})
        assert "internal_error" in answer.text
        after = scrape(server)
        assert change(before, after, "generations_total", outcome="failed") == 1
        assert change(before, after, "request_duration_seconds_count") == 0


def test_openmetrics_is_given_to_who_accepts_it_and_can_be_parsed(server: Running) -> None:
    answer = server.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(answer.text)}  # type: ignore[no-untyped-call]
    assert {
        "swaplora_requests",
        "swaplora_generations",
        "swaplora_kv_blocks",
        "swaplora_request_duration_seconds",
    } <= names


def test_metrics_want_the_key_and_take_no_parameters(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, api_key=["secret"])) as server:
        assert server.client.get("/metrics").status_code == 401
        server.client.headers["authorization"] = "Bearer secret"
        assert server.client.get("/metrics").status_code == 200
        assert server.client.get("/metrics", params={"x": "1"}).json()["error"]["param"] == "x"


def test_a_server_that_is_still_starting_shows_what_there_is(base: Path, tmp_path: Path) -> None:
    service = Service(settings(base, tmp_path))
    names = {family.name for family in service.metrics.registry.collect()}
    assert "swaplora_requests" in names
    assert "swaplora_running_sequences" not in names
    assert service.computes_with() == {"device": None, "dtype": None, "kernels": None}


def read(state: ServerState) -> dict[str, float]:
    metrics = Metrics(lambda: state, BASE)
    found = {sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples}
    return {name: count for name, count in found.items() if name.startswith("swaplora_")}


def test_the_prefix_cache_is_shown() -> None:
    counts: dict[str, Any] = {count.name: 0 for count in fields(Snapshot)} | {"num_steps": {}}
    counts |= {"num_looked_up_tokens": 100, "num_hit_tokens": 60, "num_cached_blocks": 3}
    found = read(ServerState(Snapshot(**counts), resident_bytes=5, host_bytes=7))
    assert found["swaplora_prefix_cache_queried_tokens_total"] == 100
    assert found["swaplora_prefix_cache_hit_tokens_total"] == 60
    assert found["swaplora_kv_blocks_cached"] == 3
    assert (found["swaplora_adapter_resident_bytes"], found["swaplora_adapter_host_bytes"]) == (5, 7)


def test_steps_are_counted_by_the_form_that_they_take(server: Running) -> None:
    """On a CPU nothing is recorded."""
    before = scrape(server)
    server.generate(BASE, PROMPT, max_tokens=5, ignore_eos=True)
    after = scrape(server)
    assert change(before, after, "steps_total", form="plain") == 5
    assert {form: value(after, "steps_total", form=form) for form in StepForm if form is not StepForm.PLAIN} == {
        StepForm.GRAPH: 0,
        StepForm.PROMPT: 0,
        StepForm.ADAPTER: 0,
        StepForm.ROOM: 0,
    }


def test_what_a_prompt_finds_in_the_cache_is_counted(server: Running) -> None:
    body = {"model": BASE, "prompt": [7] * 40, "max_tokens": 1}
    server.client.post("/v1/completions", json=body)
    before = scrape(server)
    server.client.post("/v1/completions", json=body)
    after = scrape(server)
    assert change(before, after, "prefix_cache_queried_tokens_total") == 40
    assert change(before, after, "prefix_cache_hit_tokens_total") == 32


def test_how_long_a_generation_takes_is_told_by_those_that_were_whole() -> None:
    metrics = Metrics(lambda: None, BASE)
    for outcome in Outcome:
        metrics.observe(GenerationRecord(outcome, 3, 2, seconds=4.0, seconds_to_first=1.0, seconds_per_token=0.5))
    value = metrics.registry.get_sample_value
    assert value("swaplora_request_duration_seconds_count") == 1
    assert value("swaplora_time_per_output_token_seconds_count") == 1
    assert value("swaplora_time_to_first_token_seconds_count") == 3
    assert value("swaplora_generated_tokens_total") == 6
