"""The same by vLLM's names, which routers, autoscalers and dashboards of others read. A request is the base's there."""

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from swaplora_server.engine.request import FinishReason
from swaplora_server.service.metrics.records import GenerationRecord, Outcome, PoolingRecord, ServerState

_TO_FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
_NUMBERS = (1, 2, 5, 10, 20)
_HISTOGRAMS = {
    "request_prompt_tokens": ("Tokens of a request's prompts", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a request", _TOKENS),
    "request_max_num_generation_tokens": ("Tokens of a request's longest choice", _TOKENS),
    "request_params_n": ("Choices of each prompt", _NUMBERS),
    "request_params_max_tokens": ("Most tokens that a choice could have", _TOKENS),
    "time_to_first_token_seconds": ("From the request to the first token", _TO_FIRST),
    "inter_token_latency_seconds": ("Between tokens, each at the mean of its request", _PER_TOKEN),
    "request_time_per_output_token_seconds": ("Between tokens, the mean of a request", _PER_TOKEN),
    "e2e_request_latency_seconds": ("From the request to its end", _LATENCY),
    "request_queue_time_seconds": ("From the request until its prompt was begun", _LATENCY),
    "request_inference_time_seconds": ("From then to the last token", _LATENCY),
    "request_prefill_time_seconds": ("From then to the first token", _LATENCY),
    "request_decode_time_seconds": ("From the first token to the last", _LATENCY),
}


class WeightedHistogram:
    """Counts values in buckets, a value any number of times at once. Not thread-safe."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` are the buckets' largest values, in order; the last bucket has none."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Bound → how many values are at most that, as Prometheus writes it."""
        found, so_far = [], 0
        for bound, count in zip([*self._bounds, float("inf")], self._counts, strict=True):
            so_far += count
            found.append((str(floatToGoString(bound)), float(so_far)))  # type: ignore[no-untyped-call]
        return found


class VllmMetrics(Collector):
    """Owns what is counted by vLLM's names. Thread-safe. All have its labels `model_name`, the base, and `engine`."""

    def __init__(self, base: str) -> None:
        self._labels = {"model_name": base, "engine": "0"}
        self._histograms = {name: WeightedHistogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self._num_tokens = {"prompt_tokens": 0, "generation_tokens": 0}
        self._num_ended: Counter[str] = Counter(dict.fromkeys(FinishReason, 0))
        self._lock = threading.Lock()

    def observe(self, record: GenerationRecord) -> None:
        """One generation is over. How fast and how long is told by those that were whole."""
        with self._lock:
            self._num_tokens["prompt_tokens"] += record.num_prompt_tokens
            self._num_tokens["generation_tokens"] += record.num_generated_tokens
            self._num_ended.update(record.finish_reasons)
            if record.seconds_to_first is not None:
                self._histograms["time_to_first_token_seconds"].observe(record.seconds_to_first)
            if record.outcome is Outcome.COMPLETED:
                self._observe_sizes(record)
                self._observe_times(record)

    def observe_pooling(self, record: PoolingRecord) -> None:
        """One request for what is read of its inputs is over; each of them counts as a choice without a token."""
        reasons = {Outcome.COMPLETED: FinishReason.STOP, Outcome.ABANDONED: FinishReason.ABORT}
        with self._lock:
            self._num_tokens["prompt_tokens"] += record.num_prompt_tokens
            self._num_ended[reasons.get(record.outcome, FinishReason.ERROR)] += record.num_inputs
            if record.outcome is Outcome.COMPLETED:
                self._histograms["request_prompt_tokens"].observe(record.num_prompt_tokens)
                self._histograms["e2e_request_latency_seconds"].observe(record.seconds)
                if record.seconds_queued is not None:
                    self._histograms["request_queue_time_seconds"].observe(record.seconds_queued)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            for name, count in self._num_tokens.items():
                yield self._counter(name, f"{name.split('_')[0].capitalize()} tokens", count)
            yield self._success()
            for name, (documentation, _) in _HISTOGRAMS.items():
                family = HistogramMetricFamily(f"vllm:{name}", documentation, labels=tuple(self._labels))
                histogram = self._histograms[name]
                family.add_metric(tuple(self._labels.values()), histogram.buckets(), histogram.total)
                yield family

    def state_families(self, state: ServerState) -> Iterator[Metric]:
        """The engine and the adapters as they stand. The old spellings are those that some routers still look for."""
        engine = state.engine
        used = (engine.num_blocks - engine.num_free_blocks) / max(1, engine.num_blocks)
        yield self._gauge("num_requests_running", "Sequences in the batch", engine.num_running)
        yield self._gauge("num_requests_waiting", "Sequences in the queue", engine.num_waiting)
        for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
            yield self._gauge(name, "Share of the KV cache that is in use, from 0 to 1", used)
        for prefix in ("", "gpu_"):
            yield self._counter(f"{prefix}prefix_cache_queries", "Prompt tokens looked up", engine.num_looked_up_tokens)
            yield self._counter(f"{prefix}prefix_cache_hits", "Of them those found", engine.num_hit_tokens)
        yield self._counter("num_preemptions", "Sequences that began again", engine.num_preempted)
        yield self._gauge(
            "cache_config_info",
            "The KV cache",
            1,
            block_size=str(engine.block_size),
            num_gpu_blocks=str(engine.num_blocks),
        )
        yield _adapters_info(state)

    def _observe_sizes(self, record: GenerationRecord) -> None:
        sizes = {
            "request_prompt_tokens": record.num_prompt_tokens,
            "request_generation_tokens": record.num_generated_tokens,
            "request_max_num_generation_tokens": record.num_longest,
            "request_params_n": record.n,
            "request_params_max_tokens": record.max_tokens,
        }
        for name, size in sizes.items():
            self._histograms[name].observe(size)

    def _observe_times(self, record: GenerationRecord) -> None:
        begun, first, last = record.seconds_queued, record.seconds_to_first, record.seconds_to_last
        self._histograms["e2e_request_latency_seconds"].observe(record.seconds)
        if record.seconds_per_token is not None:
            num_intervals = sum(max(0, count - 1) for count in record.num_generated)
            self._histograms["inter_token_latency_seconds"].observe(record.seconds_per_token, num_intervals)
            self._histograms["request_time_per_output_token_seconds"].observe(record.seconds_per_token)
        if begun is not None:
            self._histograms["request_queue_time_seconds"].observe(begun)
        if begun is not None and first is not None and last is not None:
            self._histograms["request_inference_time_seconds"].observe(last - begun)
            self._histograms["request_prefill_time_seconds"].observe(first - begun)
            self._histograms["request_decode_time_seconds"].observe(last - first)

    def _success(self) -> Metric:
        family = CounterMetricFamily(
            "vllm:request_success", "Choices that ended", labels=(*self._labels, "finished_reason")
        )
        for reason, count in self._num_ended.items():
            family.add_metric((*self._labels.values(), reason), count)
        return family

    def _gauge(self, name: str, documentation: str, value: float, **labels: str) -> Metric:
        labels = self._labels | labels
        family = GaugeMetricFamily(f"vllm:{name}", documentation, labels=tuple(labels))
        family.add_metric(tuple(labels.values()), value)
        return family

    def _counter(self, name: str, documentation: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", documentation, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family


def _adapters_info(state: ServerState) -> Metric:
    """One series, whose labels say which models need no load: what endpoint pickers prefer a server for.

    `max_lora` is how many would be in memory if those to come were as large as the mean.
    """
    resident = {adapter.name for adapter in state.adapters if adapter.tier == "device"}
    ready = [*resident, *(alias for alias, names in state.aliases if resident.issuperset(names))]
    awaited = [adapter.name for adapter in state.adapters if adapter.is_loading]
    labels = {
        "max_lora": str(len(ready) + _num_more(state)),
        "running_lora_adapters": ",".join(sorted(ready)),
        "waiting_lora_adapters": ",".join(awaited),
    }
    family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in memory, and wanted", labels=tuple(labels))
    family.add_metric(tuple(labels.values()), time.time())
    return family


def _num_more(state: ServerState) -> int:
    """Adapters of mean size that there is room for; one where there are none to tell from."""
    sizes = [adapter.num_bytes for adapter in state.adapters]
    if not sizes:
        return 1
    return int((state.budget_bytes - state.resident_bytes) // max(1, sum(sizes) / len(sizes)))
