"""The spans of generations, by the names of OpenTelemetry's conventions for generative AI. Never a prompt or an answer.

A span is made when its generation is over, of what was measured anyway: steps pay nothing.
(https://github.com/open-telemetry/semantic-conventions-genai)
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opentelemetry import context as telemetry_context
from opentelemetry.context import Context
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode, TracerProvider

from swaplora_adapters.store.records import VersionRecord
from swaplora_server.service.metrics.records import GenerationRecord, Outcome, Record
from swaplora_server.service.tracing.provider import open_provider
from swaplora_server.version import VERSION

STOP_SECONDS = 1.0  # for what was not sent yet
_NANOSECONDS = 10**9
Value = str | int | float | bool | Sequence[str] | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for, and who answers; `parent` is the request's context, in which its own span is."""

    operation: str  # chat, text_completion, embeddings or another
    model: str  # as the request names it
    records: Sequence[VersionRecord]  # of a sum all, in order; none for the base
    tenant: str
    num_cached_tokens: int
    error: str | None  # the code
    parameters: Mapping[str, Value | None]
    parent: Context


class Tracing:
    """Owns what spans are sent by. Off it does nothing."""

    def __init__(self, *, is_on: bool) -> None:
        """Raises TracingError."""
        self.is_on = is_on
        self.provider: TracerProvider = open_provider() if is_on else NoOpTracerProvider()
        self._tracer = self.provider.get_tracer("swaplora", VERSION)

    def context(self) -> Context:
        """Of the running request."""
        return telemetry_context.get_current()

    def record(self, record: Record, ask: Callable[[], Asked]) -> None:
        """One generation or pooling is over; `ask` says what it was."""
        if not self.is_on:
            return
        asked = ask()
        ended = time.time_ns()
        began = ended - _in_ns(record.seconds)
        span = self._tracer.start_span(
            f"{asked.operation} {asked.model}",
            context=asked.parent,
            kind=SpanKind.INTERNAL,
            attributes=_attributes(record, asked),
            start_time=began,
        )
        first = record.seconds_to_first if isinstance(record, GenerationRecord) else None
        for event, seconds in (("prefill", record.seconds_queued), ("first token", first)):
            if seconds is not None:
                span.add_event(event, timestamp=began + _in_ns(seconds))
        if record.outcome in (Outcome.FAILED, Outcome.EXPIRED):
            span.set_status(StatusCode.ERROR)
        span.end(ended)

    def stop(self) -> None:
        """Send what is left, if that takes no longer than a moment."""
        shutdown = getattr(self.provider, "shutdown", None)
        if shutdown is not None:
            thread = threading.Thread(target=shutdown, name="tracing-stop", daemon=True)
            thread.start()
            thread.join(STOP_SECONDS)


def _attributes(record: Record, asked: Asked) -> dict[str, Value]:
    """What did not come to be is left out."""
    versions = [f"{each.name}@{each.version}" for each in asked.records]
    told: dict[str, Value | None] = {
        "gen_ai.operation.name": asked.operation,
        "gen_ai.provider.name": "swaplora",
        "gen_ai.request.model": asked.model,
        "gen_ai.response.model": ", ".join(versions) or asked.model,
        **{f"gen_ai.request.{name}": value for name, value in asked.parameters.items()},
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": asked.num_cached_tokens,
        "swaplora.tenant": asked.tenant,
        "swaplora.queue_time": record.seconds_queued,
        "swaplora.adapter_wait_time": record.seconds_for_adapters if versions else None,
        "swaplora.outcome": str(record.outcome),
        "error.type": asked.error,
    }
    if isinstance(record, GenerationRecord):
        told["gen_ai.usage.output_tokens"] = record.num_generated_tokens
        told["gen_ai.response.finish_reasons"] = [str(reason) for reason in record.finish_reasons]
        told["gen_ai.response.time_to_first_chunk"] = record.seconds_to_first
        told["swaplora.time_per_output_token"] = record.seconds_per_token
    if versions:
        told["swaplora.adapter.name"] = [each.name for each in asked.records]
        told["swaplora.adapter.version"] = [each.version for each in asked.records]
        told["swaplora.adapter.digest"] = [each.digest for each in asked.records]
    return {name: value for name, value in told.items() if value is not None}


def _in_ns(seconds: float) -> int:
    return int(seconds * _NANOSECONDS)
