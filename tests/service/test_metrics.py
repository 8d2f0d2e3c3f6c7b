"""GET /metrics: what Prometheus's own parser reads there is what happened, with labels that nobody can multiply."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from serving import BASE, Running, serving, settings
from swaplora_adapters.registry.card import AdapterState, Tier
from swaplora_server.engine.request import FinishReason
from swaplora_server.engine.snapshot import Snapshot
from swaplora_server.kernels.step import StepForm
from swaplora_server.service.metrics.adapters import MAX_LABELLED, OTHER
from swaplora_server.service.metrics.metrics import Metrics
from swaplora_server.service.metrics.records import GenerationRecord, Outcome, ServerState
from swaplora_server.service.metrics.tenants import MAX_LABELLED as MAX_TENANTS
from swaplora_server.service.metrics.vllm import WeightedHistogram
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


NOTHING: dict[str, Any] = {count.name: 0 for count in fields(Snapshot)} | {"num_steps": {}}


def state_of(*adapters: AdapterState, **engine: Any) -> ServerState:
    """A server with these adapters, of which those on the device are resident, and room for 900 bytes."""
    resident = sum(adapter.num_bytes for adapter in adapters if adapter.tier == "device")
    return ServerState(Snapshot(**NOTHING | engine), resident, 900, 7, adapters)


def record_of(*adapters: str, outcome: Outcome = Outcome.COMPLETED, **told: Any) -> GenerationRecord:
    record = GenerationRecord(
        outcome=outcome,
        adapters=adapters,
        num_prompt_tokens=3,
        num_generated=(2,),
        finish_reasons=(FinishReason.STOP,),
        max_tokens=5,
        seconds=4.0,
        seconds_for_adapters=0.25,
        seconds_queued=0.5,
        seconds_to_first=1.0,
        seconds_to_last=1.5,
    )
    return replace(record, **told)


def read(metrics: Metrics) -> Samples:
    return samples(generate_latest(metrics.registry).decode())


def test_the_prefix_cache_is_shown() -> None:
    state = state_of(num_looked_up_tokens=100, num_hit_tokens=60, num_cached_blocks=3)
    found = read(Metrics(lambda: state, BASE))
    assert value(found, "prefix_cache_queried_tokens_total") == 100
    assert value(found, "prefix_cache_hit_tokens_total") == 60
    assert value(found, "kv_blocks_cached") == 3
    assert value(found, "adapter_host_bytes") == 7


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
        metrics.observe(record_of(outcome=outcome))
    value = metrics.registry.get_sample_value
    assert value("swaplora_request_duration_seconds_count") == 1
    assert value("swaplora_time_per_output_token_seconds_count") == 1
    assert value("swaplora_time_to_first_token_seconds_count") == len(Outcome)
    assert value("swaplora_generated_tokens_total") == 2 * len(Outcome)


def adapter_state(name: str, tier: Tier = "disk", *, is_loading: bool = False, is_pinned: bool = False) -> AdapterState:
    return AdapterState(name, 100, tier, is_loading, is_pinned)


def of_adapter(found: Samples, adapter: str) -> dict[str, float]:
    """Its samples by name and other labels, buckets left out."""
    own = {
        (name.removeprefix("swaplora_adapter_"), pairs): number
        for (name, pairs), number in found.items()
        if ("adapter", adapter) in pairs and "le" not in dict(pairs)
    }
    return {
        ".".join([name, *(text for label, text in pairs if label != "adapter")]): number
        for (name, pairs), number in own.items()
    }


def test_each_adapter_has_its_own_counts_and_those_of_a_sum_each_count_it_whole() -> None:
    state = state_of(adapter_state("law", "device", is_pinned=True), adapter_state("tax"))
    metrics = Metrics(lambda: state, BASE)
    metrics.observe(record_of())  # the base alone
    metrics.observe(record_of("law"))
    metrics.observe(record_of("law", "tax", outcome=Outcome.ABANDONED))
    metrics.adapters.looked_up(["law"], were_there=True)
    metrics.adapters.looked_up(["law", "tax"], were_there=False)
    metrics.adapters.loaded("tax", {"read": 0.5, "prepare": 0.25})
    metrics.adapters.load_failed("tax", ValueError())
    metrics.adapters.evicted("tax")
    found = read(metrics)
    law, tax = of_adapter(found, "law"), of_adapter(found, "tax")
    assert (law["generations_total.completed"], law["generations_total.abandoned"]) == (1, 1)
    assert (law["prompt_tokens_total"], law["generated_tokens_total"]) == (6, 4)
    assert (law["time_to_first_token_seconds_sum"], law["time_to_first_token_seconds_count"]) == (2.0, 2)
    assert (law["time_per_output_token_seconds_sum"], law["time_per_output_token_seconds_count"]) == (0.5, 1)
    assert (law["queue_time_seconds_sum"], law["wait_seconds_sum"]) == (1.0, 0.5)
    assert (law["hits_total"], law["misses_total"], tax["misses_total"]) == (1, 1, 1)
    assert (tax["load_seconds_sum.read"], tax["load_seconds_sum.prepare"]) == (0.5, 0.25)
    assert (tax["load_failures_total"], tax["evictions_total"]) == (1, 1)
    assert (law["bytes"], law["pinned"], tax["pinned"]) == (100, 1, 0)
    assert [law[f"residency.{tier}"] for tier in ("device", "host", "disk")] == [1, 0, 0]
    assert [tax[f"residency.{tier}"] for tier in ("device", "host", "disk")] == [0, 0, 1]
    assert value(found, "generations_total", outcome="completed") == 2
    assert of_adapter(found, OTHER) == {}


def use(metrics: Metrics, name: str) -> None:
    """All that can happen to an adapter."""
    metrics.adapters.looked_up([name], were_there=False)
    metrics.adapters.loaded(name, {"read": 1, "verify": 1, "prepare": 1})
    metrics.adapters.load_failed(name, ValueError())
    for outcome in Outcome:
        metrics.observe(record_of(name, outcome=outcome))
    metrics.adapters.evicted(name)
    metrics.adapters.looked_up([name], were_there=True)


def test_series_stay_bounded_whatever_adapters_come_and_go() -> None:
    names: dict[str, None] = {}
    metrics = Metrics(lambda: state_of(*map(adapter_state, names)), BASE, names.__contains__)
    num_without = len(read(metrics))
    for number in range(1000):
        names[f"adapter-{number}"] = None
        use(metrics, f"adapter-{number}")
        metrics.observe(record_of(f"adapter-{number // 2}"))
        if number % 3 == 0:
            del names[next(iter(names))]  # the oldest, which may be used all the same from now on
        if number in {300, 999}:
            found = read(metrics)
            labels = {dict(pairs)["adapter"] for _, pairs in found if "adapter" in dict(pairs)}
            assert len(labels) <= MAX_LABELLED + 1
            assert labels - {OTHER} <= names.keys()
            assert len(found) - num_without < 70 * (MAX_LABELLED + 1)
    assert sum(value(found, "generations_total", outcome=outcome) for outcome in Outcome) == 1000 * (len(Outcome) + 1)
    assert of_adapter(found, OTHER)["residency.disk"] == len(names) - len(labels - {OTHER})
    names.clear()
    assert {dict(pairs)["adapter"] for _, pairs in read(metrics) if "adapter" in dict(pairs)} == {OTHER}


def test_what_is_deleted_is_gone_at_the_next_scrape_and_its_label_goes_to_another() -> None:
    names = {f"adapter-{number}" for number in range(MAX_LABELLED)}
    metrics = Metrics(lambda: state_of(), BASE, names.__contains__)
    for name in sorted(names):
        metrics.adapters.evicted(name)
    names.add("late")
    use(metrics, "late")
    found = read(metrics)
    assert of_adapter(found, "late") == {}
    assert of_adapter(found, OTHER)["evictions_total"] == 1
    names.discard("adapter-7")
    assert of_adapter(read(metrics), "adapter-7") == {}
    use(metrics, "adapter-7")  # a request that ends after the adapter it ran on
    use(metrics, "late")
    found = read(metrics)
    assert of_adapter(found, "adapter-7") == {}
    assert of_adapter(found, "late")["evictions_total"] == 1
    assert of_adapter(found, "adapter-8")["load_failures_total"] == 0  # a rate needs its zero
    assert of_adapter(found, OTHER)["evictions_total"] == 2


def test_an_adapter_that_is_called_as_the_rest_is_counted_with_it_and_outlives_no_one() -> None:
    names = {OTHER}
    metrics = Metrics(lambda: state_of(), BASE, names.__contains__)
    use(metrics, OTHER)
    names.clear()
    assert of_adapter(read(metrics), OTHER)["evictions_total"] == 1


def test_requests_loads_and_residency_of_an_adapter_are_seen_over_http(server: Running, adapters: list[Path]) -> None:
    server.put("seen", adapters[1])
    for _ in range(2):
        server.token_ids("seen", PROMPT, max_tokens=3, ignore_eos=True)
    server.wait_idle()
    seen = of_adapter(scrape(server), "seen")
    assert seen["generations_total.completed"] == 2
    assert (seen["prompt_tokens_total"], seen["generated_tokens_total"]) == (2 * len(PROMPT), 6)
    assert (seen["hits_total"], seen["misses_total"]) == (1, 1)
    assert seen["queue_time_seconds_count"] == seen["time_to_first_token_seconds_count"] == 2
    assert {stage: seen[f"load_seconds_count.{stage}"] for stage in ("read", "verify", "prepare")} == {
        "read": 1,
        "verify": 1,
        "prepare": 1,
    }
    assert seen["bytes"] == server.service.registry.resident_bytes > 0
    assert seen["residency.device"] == 1
    server.client.patch("/v1/adapters/seen", json={"pinned": True})
    assert of_adapter(scrape(server), "seen")["pinned"] == 1
    server.client.delete("/v1/adapters/seen")
    assert of_adapter(scrape(server), "seen") == {}


def vllm_value(found: Samples, name: str, **labels: str) -> float:
    return found[f"vllm:{name}", tuple(sorted(({"model_name": BASE, "engine": "0"} | labels).items()))]


def test_what_others_read_by_their_names_is_what_happened(server: Running) -> None:
    server.generate(BASE, PROMPT, max_tokens=1)
    before = scrape(server)
    server.generate(BASE, PROMPT, max_tokens=5, n=2, ignore_eos=True)
    server.wait_idle()
    after = scrape(server)

    def grown(name: str, **labels: str) -> float:
        return vllm_value(after, name, **labels) - vllm_value(before, name, **labels)

    assert (grown("prompt_tokens_total"), grown("generation_tokens_total")) == (len(PROMPT), 10)
    assert grown("request_success_total", finished_reason="length") == 2
    assert grown("inter_token_latency_seconds_count") == 8
    for name in (
        *("time_to_first_token", "request_time_per_output_token", "e2e_request_latency", "request_queue_time"),
        *("request_inference_time", "request_prefill_time", "request_decode_time"),
    ):
        assert grown(f"{name}_seconds_count") == grown(f"{name}_seconds_bucket", le="+Inf") == 1
        assert grown(f"{name}_seconds_sum") > 0
    for name, size in {
        "request_prompt_tokens": len(PROMPT),
        "request_generation_tokens": 10,
        "request_max_num_generation_tokens": 5,
        "request_params_n": 2,
        "request_params_max_tokens": 5,
    }.items():
        assert (grown(f"{name}_count"), grown(f"{name}_sum")) == (1, size)
    assert vllm_value(after, "num_requests_running") == vllm_value(after, "num_requests_waiting") == 0
    assert vllm_value(after, "kv_cache_usage_perc") == vllm_value(after, "gpu_cache_usage_perc") == 0
    pool = server.service.engine.snapshot()
    info = vllm_value(after, "cache_config_info", block_size="16", num_gpu_blocks=str(pool.num_blocks))
    assert info == 1
    hits = change(before, after, "prefix_cache_hit_tokens_total")
    assert grown("prefix_cache_hits_total") == grown("gpu_prefix_cache_hits_total") == hits == 2 * 16


def test_the_share_of_the_cache_that_is_used_is_between_0_and_1() -> None:
    for num_free, share in ((8, 0.0), (6, 0.25), (0, 1.0)):
        state = state_of(num_blocks=8, num_free_blocks=num_free)
        assert vllm_value(read(Metrics(lambda state=state: state, BASE)), "kv_cache_usage_perc") == share  # type: ignore[misc]


def lora_info(found: Samples) -> dict[str, str]:
    """The labels of the one series."""
    ((_, pairs),) = (key for key in found if key[0] == "vllm:lora_requests_info")
    return dict(pairs)


def test_one_series_tells_which_adapters_need_no_load_and_how_many_more_there_is_room_for() -> None:
    state = state_of(
        adapter_state("law", "device"),
        adapter_state("old", "host"),
        adapter_state("soon", is_loading=True),
        adapter_state("tax", "device"),
    )
    state = replace(state, aliases=[("canary", ["law", "old"]), ("prod", ["law", "tax"])])
    assert lora_info(read(Metrics(lambda: state, BASE))) == {
        "running_lora_adapters": "law,prod,tax",
        "waiting_lora_adapters": "soon",
        "max_lora": str(3 + 7),
    }
    assert lora_info(read(Metrics(state_of, BASE))) == {
        "running_lora_adapters": "",
        "waiting_lora_adapters": "",
        "max_lora": "1",
    }


def test_the_adapters_that_need_no_load_are_those_in_memory(server: Running, adapters: list[Path]) -> None:
    for name, folder in zip("xyz", adapters, strict=False):
        server.put(name, folder)
    for name in "zx":
        server.token_ids(name, PROMPT, max_tokens=1)
    assert lora_info(scrape(server))["running_lora_adapters"] == "x,z"
    for name in "xyz":
        server.client.delete(f"/v1/adapters/{name}")
    assert lora_info(scrape(server))["running_lora_adapters"] == ""


@given(values=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 5))), bounds=st.sets(st.floats(0, 100), min_size=1))
def test_a_weighted_histogram_counts_each_value_as_often_as_it_is_told(
    values: list[tuple[float, int]], bounds: set[float]
) -> None:
    histogram = WeightedHistogram(sorted(bounds))
    for number, times in values:
        histogram.observe(number, times)
    for bound, count in histogram.buckets():
        assert count == sum(times for number, times in values if number <= float(bound))
    assert histogram.total == pytest.approx(sum(number * times for number, times in values))


def test_a_generation_that_fails_or_is_left_says_so_of_the_choices_that_were_open() -> None:
    metrics = Metrics(lambda: None, BASE)
    reasons = (FinishReason.STOP, FinishReason.ERROR)
    metrics.observe(record_of(outcome=Outcome.FAILED, num_generated=(2, 0), finish_reasons=reasons))
    found = read(metrics)
    for reason, count in {"stop": 1, "error": 1, "abort": 0, "length": 0}.items():
        assert vllm_value(found, "request_success_total", finished_reason=reason) == count
    assert vllm_value(found, "e2e_request_latency_seconds_count") == 0


def test_tenants_are_told_apart_and_those_beyond_the_bound_share_a_label() -> None:
    names = ["", *(f"t{number}" for number in range(MAX_TENANTS + 5))]
    state = replace(state_of(), tenants=dict.fromkeys(names, 2))
    metrics = Metrics(lambda: state, BASE)
    for name in names:
        metrics.observe(record_of(tenant=name, seconds_queued=0.5))
    metrics.observe(record_of(tenant="t0", seconds_queued=None))
    found = read(metrics)
    assert value(found, "tenant_queue_time_seconds_count", tenant="default") == 1
    assert value(found, "tenant_queue_time_seconds_count", tenant="t0") == 1
    assert value(found, "tenant_queue_time_seconds_count", tenant="other") == 6
    assert value(found, "tenant_sequences", tenant="t0") == 2
    assert value(found, "tenant_sequences", tenant="other") == 12


def test_how_many_of_a_tenant_are_here_is_shown(server: Running) -> None:
    admission = server.service.admissions.admit(2, "acme", BASE)
    assert value(scrape(server), "tenant_sequences", tenant="acme") == 2
    admission.release()
