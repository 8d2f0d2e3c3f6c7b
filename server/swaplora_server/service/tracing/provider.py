"""What spans are sent by, and where to: the standard variables OTEL_… say it. Needs the extra otel."""

import os

from opentelemetry.trace import TracerProvider

from swaplora_server.version import VERSION

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTER, PROTOCOL = "otlp", "http/protobuf"


class TracingError(RuntimeError):
    """Spans cannot be sent; the message is for the operator."""


def open_provider() -> TracerProvider:
    """Sends in a thread of its own, in batches, what a sampler of OTEL_TRACES_SAMPLER lets through.

    Raises TracingError.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk import trace as sdk
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingError("--tracing needs OpenTelemetry's SDK: pip install 'swaplora[otel]'") from error
    _check_environment()
    resource = Resource.create({"service.version": VERSION})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):  # neither variable names it
        resource = resource.merge(Resource({"service.name": "swaplora"}))
    sending = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
    sending.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    provider: TracerProvider = sending
    return provider


def _check_environment() -> None:
    """Raise TracingError for what would be sent otherwise than it says, or nowhere."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or EXPORTER
    if exporter != EXPORTER:
        raise TracingError(f"OTEL_TRACES_EXPORTER is {exporter!r}, and --tracing sends {EXPORTER} alone: leave one out")
    protocol = _first(PROTOCOLS) or PROTOCOL
    if protocol != PROTOCOL:
        raise TracingError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, and --tracing sends {PROTOCOL} alone")
    endpoint = _first(ENDPOINTS)
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise TracingError(f"{endpoint!r} is no endpoint: OTEL_EXPORTER_OTLP_ENDPOINT begins with http:// or https://")


def _first(names: tuple[str, ...]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)
