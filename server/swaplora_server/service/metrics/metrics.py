"""What the server counts, and the registry that a scrape reads."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

from swaplora_server.service.metrics.adapters import AdapterMetrics
from swaplora_server.service.metrics.records import GenerationRecord, Outcome, PoolingRecord, Record, ServerState
from swaplora_server.service.metrics.state import StateCollector
from swaplora_server.service.metrics.tenants import TenantMetrics
from swaplora_server.service.metrics.vllm import VllmMetrics

_TO_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
disable_created_metrics()  # type: ignore[no-untyped-call]  # a third of all series, and few ask when a count began


class Metrics:
    """Owns the registry that a scrape reads. A step of the engine pays nothing; a request pays once, at its end."""

    def __init__(
        self,
        read_state: Callable[[], ServerState | None],
        base: str,
        is_adapter: Callable[[str], bool] = lambda _name: True,
    ) -> None:
        """`read_state` is asked at each scrape; None while there is no engine yet.

        `is_adapter` says whether there is an adapter of a name, at once and without a lock.
        """
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        adapter_series = CollectorRegistry()
        self.adapters = AdapterMetrics(adapter_series, is_adapter)
        self._tenants = TenantMetrics(self.registry)
        self._vllm = VllmMetrics(base)
        state = StateCollector(read_state, base, self.adapters, self._tenants, self._vllm)
        for collector in (state, adapter_series, self._vllm):
            self.registry.register(collector)
        self._requests = Counter(
            "swaplora_requests", "HTTP requests answered", ["route", "status"], registry=self.registry
        )
        self._generations = Counter(
            "swaplora_generations", "Generations that ended", ["outcome"], registry=self.registry
        )
        self._poolings = Counter(
            "swaplora_poolings",
            "Requests for embeddings, classes or scores that ended",
            ["outcome"],
            registry=self.registry,
        )
        self._pooled_inputs = Counter("swaplora_pooled_inputs", "Inputs of these", registry=self.registry)
        self._step_backs = Counter(
            "swaplora_canary_step_backs", "Canaries that get no more requests", registry=self.registry
        )
        self._unseen = Counter(
            "swaplora_shared_store_unseen_requests",
            "Requests that went on with what was known, since the shared store did not answer",
            registry=self.registry,
        )
        self._retried = Counter(
            "swaplora_retried_requests",
            "Requests that another replica was given before, and did not answer",
            registry=self.registry,
        )
        self._prompt_tokens = Counter("swaplora_prompt_tokens", "Prompt tokens", registry=self.registry)
        self._generated_tokens = Counter("swaplora_generated_tokens", "Generated tokens", registry=self.registry)
        self._queued = self._histogram("queue_time", "From the request until its prompt was begun", _TO_FIRST)
        self._to_first = self._histogram("time_to_first_token", "From the request to the first token", _TO_FIRST)
        self._per_token = self._histogram("time_per_output_token", "Between tokens, the mean of a request", _PER_TOKEN)
        self._whole = self._histogram("request_duration", "From the request to the end of its generation", _WHOLE)
        for outcome in Outcome:
            self._generations.labels(outcome)  # shown from the start: a rate needs its zero
            self._poolings.labels(outcome)

    def count_request(self, route: str, status: int | None) -> None:
        """One HTTP request is over. `route` is its template; status None is one whose answer was never begun."""
        self._requests.labels(route, "none" if status is None else f"{status // 100}xx").inc()

    def count_step_back(self) -> None:
        """The canary of an alias has failed too often."""
        self._step_backs.inc()

    def count_unseen(self) -> None:
        """A request may not have seen what other servers have acknowledged."""
        self._unseen.inc()

    def count_retried(self) -> None:
        """A request comes from a replica that was lost, or not well."""
        self._retried.inc()

    def observe_pooling(self, record: PoolingRecord) -> None:
        """One request for what is read of its inputs is over."""
        self._poolings.labels(record.outcome).inc()
        self._pooled_inputs.inc(record.num_inputs)
        self._observe(record)
        self.adapters.observe_pooling(record)
        self._vllm.observe_pooling(record)

    def _observe(self, record: Record) -> None:
        self._prompt_tokens.inc(record.num_prompt_tokens)
        if record.seconds_queued is not None:
            self._queued.observe(record.seconds_queued)

    def observe(self, record: GenerationRecord) -> None:
        """One generation is over. How fast and how long is told by those that were whole."""
        self._generations.labels(record.outcome).inc()
        self._generated_tokens.inc(record.num_generated_tokens)
        self._observe(record)
        if record.seconds_to_first is not None:
            self._to_first.observe(record.seconds_to_first)
        if record.outcome is Outcome.COMPLETED:
            self._whole.observe(record.seconds)
            if record.seconds_per_token is not None:
                self._per_token.observe(record.seconds_per_token)
        self.adapters.observe(record)
        self._tenants.observe(record)
        self._vllm.observe(record)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"swaplora_{name}_seconds", documentation, buckets=buckets, registry=self.registry)
