"""Traces, as a collector gets them: a span for each request and, below it, one for its generation; never a prompt."""

import builtins
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serving import BASE, Running, serving, settings
from swaplora_server.serve import StartError, run
from swaplora_server.service.tracing import tracing
from swaplora_server.service.tracing.provider import TracingError
from swaplora_server.service.tracing.tracing import Tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "xyzzy plugh"
OTHERS = {  # than those whose values are known
    "gen_ai.request.top_p",
    "gen_ai.request.top_k",
    "gen_ai.request.presence_penalty",
    "gen_ai.request.frequency_penalty",
    "gen_ai.response.time_to_first_chunk",
    "swaplora.queue_time",
    "swaplora.adapter_wait_time",
    "swaplora.time_per_output_token",
}
SILENT = ("/health", "/health/ready", "/ping", "/version", "/metrics")


class Collector(HTTPServer):
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.received: list[tuple[str, bytes]] = []

    def spans(self) -> list[Any]:
        """All spans, in the order in which they ended."""
        sent = [ExportTraceServiceRequest.FromString(body) for _, body in self.received]
        return [s for one in sent for resource in one.resource_spans for of in resource.scope_spans for s in of.spans]


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        self.server.received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def traced(
    base: Path, adapters: list[Path], collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        patch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # which would send each span twice
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        with serving(settings(base, tmp_path_factory.mktemp("data"), tracing=True)) as running:
            assert running.put("sql", adapters[1]).status_code == 201
            assert running.put("json", adapters[2]).status_code == 201
            yield running


@pytest.fixture
def _nothing_sent(traced: Running, collector: Collector) -> None:
    flush(traced, collector)
    collector.received.clear()


def flush(traced: Running, collector: Collector) -> list[Any]:
    """All that has ended. A request's span does so a moment after its client has the answer."""
    spans, before = list[Any](), -1
    while len(spans) > before:
        before = len(spans)
        time.sleep(0.05)
        traced.service.tracing.provider.force_flush()  # type: ignore[attr-defined]
        spans = collector.spans()
    return spans


def told(span: Any) -> dict[str, Any]:
    """Its attributes."""
    return {each.key: value(each.value) for each in span.attributes}


def value(any_value: Any) -> Any:
    kind = any_value.WhichOneof("value")
    if kind == "array_value":
        return [value(each) for each in any_value.array_value.values]
    return getattr(any_value, kind)


def generation(spans: list[Any]) -> Any:
    [found] = [span for span in spans if "gen_ai.operation.name" in told(span)]
    return found


@pytest.mark.usefixtures("_nothing_sent")
def test_a_generation_is_a_child_of_its_request_and_that_of_the_clients(
    traced: Running, collector: Collector, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    body = {"model": "sql", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "temperature": 0.5}
    body |= {"ignore_eos": True, "seed": 7, "n": 2}
    answer = traced.client.post(
        "/v1/chat/completions", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}
    ).json()
    spans = flush(traced, collector)
    assert len(spans) == 2
    mine = generation(spans)
    [request] = [span for span in spans if span is not mine]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert request.parent_span_id.hex() == PARENT
    assert mine.parent_span_id == request.span_id
    assert (request.name, mine.name) == ("POST /v1/chat/completions", "chat sql")
    assert request.start_time_unix_nano <= mine.start_time_unix_nano
    assert mine.end_time_unix_nano <= request.end_time_unix_nano + 10**7
    attributes = told(mine)
    card = traced.client.get("/v1/adapters/sql").json()
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "swaplora",
        "gen_ai.request.model": "sql",
        "gen_ai.response.model": "sql@1",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": False,
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "swaplora.adapter.name": ["sql"],
        "swaplora.adapter.version": [1],
        "swaplora.adapter.digest": [card["digest"]],
        "swaplora.tenant": "default",
        "swaplora.outcome": "completed",
    }
    assert {key: attributes[key] for key in expected} == expected
    assert attributes.keys() - expected.keys() == OTHERS
    first, queued = attributes["gen_ai.response.time_to_first_chunk"], attributes["swaplora.queue_time"]
    assert 0 <= queued <= first <= (mine.end_time_unix_nano - mine.start_time_unix_nano) / 1e9
    assert attributes["swaplora.adapter_wait_time"] >= 0
    assert [event.name for event in mine.events] == ["prefill", "first token"]
    assert f"trace_id={TRACE}" in re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    for _, raw in collector.received:
        assert SECRET.encode() not in raw


@pytest.mark.usefixtures("_nothing_sent")
def test_who_sends_no_trace_begins_one_and_probes_have_none(traced: Running, collector: Collector) -> None:
    for path in SILENT:
        assert traced.client.get(path).status_code == 200
    traced.token_ids(BASE, [5, 6, 7], adapters=[{"name": "sql"}, {"name": "json", "scale": 0.5}])
    traced.client.get("/v1/models", headers={"traceparent": "00-nonsense"})
    traced.client.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})  # sampled by nobody
    spans = flush(traced, collector)
    assert sorted(span.name for span in spans) == ["GET /v1/models", "POST /v1/completions", "text_completion base"]
    assert len({span.trace_id for span in spans}) == 2
    attributes = told(generation(spans))
    assert attributes["gen_ai.response.model"] == "sql@1, json@1"
    assert attributes["swaplora.adapter.name"] == ["sql", "json"]


@pytest.mark.usefixtures("_nothing_sent")
def test_the_base_has_no_adapter_and_vectors_are_embeddings(traced: Running, collector: Collector) -> None:
    answer = traced.client.post("/v1/embeddings", json={"model": BASE, "input": SECRET})
    attributes = told(generation(flush(traced, collector)))
    assert attributes["gen_ai.operation.name"] == "embeddings"
    assert attributes["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert not [key for key in attributes if "adapter" in key]


@pytest.mark.usefixtures("_nothing_sent")
def test_what_fails_and_who_leaves_is_told(
    traced: Running, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = {"model": "sql", "prompt": [5, 6], "max_tokens": 400, "ignore_eos": True}
    refused = traced.client.post("/v1/completions", json=late, headers={"X-Request-Timeout": "0.02"})
    assert refused.status_code == 504
    spans = flush(traced, collector)
    request = next(span for span in spans if span.name == "POST /v1/completions")
    assert (request.status.code, told(request)["http.response.status_code"]) == (2, 504)
    for span in (each for each in spans if each is not request):  # it may have ended before it was begun
        assert (span.status.code, told(span)["error.type"]) == (2, "deadline_exceeded")
    collector.received.clear()
    with traced.client.stream("POST", "/v1/completions", json=late | {"stream": True}) as answer:
        next(answer.iter_lines())
    traced.wait_idle()
    deadline = time.monotonic() + 30
    while len(spans := flush(traced, collector)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    left = told(generation(spans))
    assert (left["swaplora.outcome"], left["gen_ai.response.finish_reasons"]) == ("abandoned", ["abort"])
    assert "error.type" not in left


def test_what_is_sent_says_whose_it_is_and_where_it_comes_from(traced: Running, collector: Collector) -> None:
    traced.client.get("/v1/models")
    flush(traced, collector)
    path, body = collector.received[-1]
    resource = told(ExportTraceServiceRequest.FromString(body).resource_spans[0].resource)
    assert path == "/v1/traces"
    assert resource["service.name"] == "swaplora"
    assert resource["deployment.environment.name"] == "test"
    assert re.fullmatch(r"\d+\.\d+\.\d+", resource["service.version"])


def test_off_nothing_is_made_whatever_the_environment_says(
    base: Path, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    collector.received.clear()
    with serving(settings(base, tmp_path)) as server:
        server.token_ids(BASE, [5, 6, 7])
        assert not server.service.tracing.is_on
    assert collector.received == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "is 'http/json'"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "OTEL_TRACES_EXPORTER is 'console'"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "'collector:4318' is no endpoint"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "unix:/run/x"}, "'unix:/run/x' is no endpoint"),
    ],
)
def test_a_server_does_not_start_with_an_environment_that_means_something_else(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, given in variables.items():
        monkeypatch.setenv(name, given)
    with pytest.raises(StartError, match=re.escape(message)):
        run(settings(base, tmp_path, tracing=True))


def test_without_the_extra_the_error_names_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            raise ModuleNotFoundError(name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not Tracing(is_on=False).is_on
    with pytest.raises(TracingError, match=r"pip install 'swaplora\[otel\]'"):
        Tracing(is_on=True)


def test_a_collector_that_is_not_there_holds_nobody_up(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(tracing, "STOP_SECONDS", 0.2)
    with serving(settings(base, tmp_path, tracing=True)) as server:
        server.token_ids(BASE, [5, 6, 7])
        began = time.monotonic()
    assert time.monotonic() - began < 30  # what it tries to send takes minutes
