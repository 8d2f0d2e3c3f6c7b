"""What the server counts: requests and generations as each ends, and the engine's and adapters' state when asked."""

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from swaplora_server.engine.snapshot import Snapshot

Family = CounterMetricFamily | GaugeMetricFamily | InfoMetricFamily
_TO_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Outcome(enum.StrEnum):
    """How a generation ended: whole, left by its client, or with an error."""

    COMPLETED = "completed"
    ABANDONED = "abandoned"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """A generation that has ended. Token counts are over all choices; None is what there were too few tokens for."""

    outcome: Outcome
    num_prompt_tokens: int
    num_generated_tokens: int
    seconds: float
    seconds_to_first: float | None
    seconds_per_token: float | None


@dataclass(frozen=True, slots=True)
class ServerState:
    """The engine and the adapters at one moment."""

    engine: Snapshot
    resident_bytes: int  # of adapters, where steps read them
    host_bytes: int  # of adapters, in the host's memory beside a GPU's


class Metrics:
    """Owns the registry that a scrape reads. A step of the engine pays nothing; a request pays once, at its end."""

    def __init__(self, read_state: Callable[[], ServerState | None], base: str) -> None:
        """`read_state` is asked at each scrape; None while there is no engine yet."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_StateCollector(read_state, base))
        self._requests = Counter(
            "swaplora_requests", "HTTP requests answered", ["route", "status"], registry=self.registry
        )
        self._generations = Counter(
            "swaplora_generations", "Generations that ended", ["outcome"], registry=self.registry
        )
        self._prompt_tokens = Counter("swaplora_prompt_tokens", "Prompt tokens", registry=self.registry)
        self._generated_tokens = Counter("swaplora_generated_tokens", "Generated tokens", registry=self.registry)
        self._to_first = self._histogram("time_to_first_token", "From the request to the first token", _TO_FIRST)
        self._per_token = self._histogram("time_per_output_token", "Between tokens, the mean of a request", _PER_TOKEN)
        self._whole = self._histogram("request_duration", "From the request to the end of its generation", _WHOLE)
        for outcome in Outcome:
            self._generations.labels(outcome)  # shown from the start: a rate needs its zero

    def count_request(self, route: str, status: int | None) -> None:
        """One HTTP request is over. `route` is its template; status None is one whose answer was never begun."""
        self._requests.labels(route, "none" if status is None else f"{status // 100}xx").inc()

    def observe(self, record: GenerationRecord) -> None:
        """One generation is over. How fast and how long is told by those that were whole."""
        self._generations.labels(record.outcome).inc()
        self._prompt_tokens.inc(record.num_prompt_tokens)
        self._generated_tokens.inc(record.num_generated_tokens)
        if record.seconds_to_first is not None:
            self._to_first.observe(record.seconds_to_first)
        if record.outcome is Outcome.COMPLETED:
            self._whole.observe(record.seconds)
            if record.seconds_per_token is not None:
                self._per_token.observe(record.seconds_per_token)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"swaplora_{name}_seconds", documentation, buckets=buckets, registry=self.registry)


class _StateCollector(Collector):
    """Asks for the state when it is scraped, so that nobody has to report changes of it."""

    def __init__(self, read_state: Callable[[], ServerState | None], base: str) -> None:
        self._read_state = read_state
        self._base = base

    def collect(self) -> Iterator[Family]:
        yield InfoMetricFamily("swaplora", "This server", {"version": version("swaplora"), "base": self._base})
        state = self._read_state()
        if state is None:
            return
        engine = state.engine
        yield GaugeMetricFamily("swaplora_running_sequences", "Sequences in the batch", engine.num_running)
        yield GaugeMetricFamily("swaplora_waiting_sequences", "Sequences in the queue", engine.num_waiting)
        yield GaugeMetricFamily("swaplora_kv_blocks", "Blocks of the KV cache", engine.num_blocks)
        yield GaugeMetricFamily("swaplora_kv_blocks_free", "Blocks that are free", engine.num_free_blocks)
        yield CounterMetricFamily(
            "swaplora_isolated_failures", "Requests that failed alone in the engine", engine.num_failed_requests
        )
        yield _steps_family(engine)
        yield GaugeMetricFamily("swaplora_adapter_resident_bytes", "Memory of adapters", state.resident_bytes)
        yield GaugeMetricFamily(
            "swaplora_adapter_host_bytes", "Host memory of adapters beside a GPU's", state.host_bytes
        )
        yield from _prefix_cache_families(engine)


def _steps_family(engine: Snapshot) -> Family:
    steps = CounterMetricFamily("swaplora_steps", "Steps of the engine", labels=["form"])
    for form, count in engine.num_steps.items():
        steps.add_metric([form], count)
    return steps


def _prefix_cache_families(engine: Snapshot) -> Iterator[Family]:
    yield GaugeMetricFamily(
        "swaplora_kv_blocks_cached", "Blocks that later prompts can begin with", engine.num_cached_blocks
    )
    looked_up, hit = engine.num_looked_up_tokens, engine.num_hit_tokens
    yield CounterMetricFamily("swaplora_prefix_cache_queried_tokens", "Prompt tokens looked up", looked_up)
    yield CounterMetricFamily("swaplora_prefix_cache_hit_tokens", "Of them those found", hit)
