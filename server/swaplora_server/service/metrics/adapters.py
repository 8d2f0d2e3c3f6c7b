"""What is counted of each adapter, under at most so many labels: the rest share one, and who is deleted has none."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from prometheus_client.core import GaugeMetricFamily

from swaplora_adapters.errors import AdapterError
from swaplora_adapters.registry.card import AdapterState, Tier
from swaplora_server.service.metrics.records import GenerationRecord, Outcome, PoolingRecord, Record

MAX_LABELLED = 64  # adapters; each is about 60 series
OTHER = "other"
TIERS: tuple[Tier, ...] = ("device", "host", "disk")
_log = structlog.get_logger(__name__)
_TO_FIRST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1)


class AdapterLabels:
    """Which adapters have a label of their own: the first `limit` that were used, as long as they are there.

    An adapter keeps its label until it is deleted, so that a series goes on. Not thread-safe.
    """

    def __init__(self, is_there: Callable[[str], bool], limit: int) -> None:
        self._is_there = is_there
        self._limit = limit
        self._labelled: set[str] = set()

    def used(self, name: str) -> str:
        """The label of an adapter that is used, which it gets if there is one left and it was not deleted meanwhile."""
        if name not in self._labelled and name != OTHER and len(self._labelled) < self._limit and self._is_there(name):
            self._labelled.add(name)
        return self.of(name)

    def of(self, name: str) -> str:
        """Its own or that of the rest."""
        return name if name in self._labelled else OTHER

    def take_back(self) -> list[str]:
        """The labels of adapters that are no more; others may have them from now on."""
        gone = [name for name in self._labelled if not self._is_there(name)]
        self._labelled.difference_update(gone)
        return gone


class AdapterMetrics:
    """Counts what requests do with adapters and what becomes of these in memory. Thread-safe.

    It is the registry's `UsageListener`.
    """

    def __init__(self, registry: CollectorRegistry, is_there: Callable[[str], bool], limit: int = MAX_LABELLED) -> None:
        """`is_there` says whether there is an adapter of a name. It is called with a lock held, and takes none."""
        self._limit = limit
        self._labels = AdapterLabels(is_there, limit)
        self._shown: set[str] = set()  # labels whose counts have begun
        self._lock = threading.Lock()  # what is deleted gets no series after its own were taken away

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"swaplora_adapter_{name}", documentation, ["adapter", *labels], registry=registry)

        def histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
            name = f"swaplora_adapter_{name}_seconds"
            return Histogram(name, documentation, ["adapter"], buckets=buckets, registry=registry)

        def summary(name: str, documentation: str, *labels: str) -> Summary:
            return Summary(f"swaplora_adapter_{name}_seconds", documentation, ["adapter", *labels], registry=registry)

        self._generations = counter("generations", "Generations with it that ended", "outcome")
        self._poolings = counter("poolings", "Requests for embeddings, classes or scores of it that ended", "outcome")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of these")
        self._generated_tokens = counter("generated_tokens", "Generated tokens of these")
        self._to_first = histogram("time_to_first_token", "From the request to the first token", _TO_FIRST)
        self._per_token = histogram("time_per_output_token", "Between tokens, the mean of a request", _PER_TOKEN)
        self._queued = histogram("queue_time", "From the request until its prompt was begun", _TO_FIRST)
        self._awaited = summary("wait", "Of requests, for memory and for the adapter to be there")
        self._hits = counter("hits", "Requests whose adapters could be had at once")
        self._misses = counter("misses", "Requests that had to wait for an adapter to be loaded, or for memory")
        self._loading = summary("load", "Bringing it into memory", "stage")
        self._load_failures = counter("load_failures", "Times that this failed")
        self._evictions = counter("evictions", "Times that it gave its memory to another")
        self._all = (
            *(self._generations, self._poolings, self._prompt_tokens, self._generated_tokens, self._to_first),
            self._per_token,
            *(self._queued, self._awaited, self._hits, self._misses, self._loading, self._load_failures),
            self._evictions,
        )

    def observe(self, record: GenerationRecord) -> None:
        """One generation is over. Each adapter of a sum counts it whole."""
        with self._lock:
            for name in record.adapters:
                self._observe(self._used(name), record)

    def observe_pooling(self, record: PoolingRecord) -> None:
        """The same of a request for what is read of its inputs."""
        with self._lock:
            for name in record.adapters:
                label = self._used(name)
                self._poolings.labels(label, record.outcome).inc()
                self._observe_any(label, record)

    def looked_up(self, names: Sequence[str], *, were_there: bool) -> None:
        """See `UsageListener`."""
        counter = self._hits if were_there else self._misses
        self._count(counter, names)

    def loaded(self, name: str, stages: dict[str, float]) -> None:
        """See `UsageListener`."""
        with self._lock:
            label = self._used(name)
            for stage, seconds in stages.items():
                self._loading.labels(label, stage).observe(seconds)

    def load_failed(self, name: str, error: BaseException) -> None:
        """See `UsageListener`. Logged as well, since a disk that rots is told by nothing else."""
        reason = str(error) if isinstance(error, AdapterError) else type(error).__name__
        _log.warning("an adapter cannot be loaded", adapter=name, reason=reason)
        self._count(self._load_failures, [name])

    def evicted(self, name: str) -> None:
        """See `UsageListener`."""
        self._count(self._evictions, [name])

    def forget_deleted(self) -> None:
        """Take away the series of adapters that are no more."""
        with self._lock:
            for name in self._labels.take_back():
                self._shown.discard(name)
                for metric in self._all:
                    metric.remove_by_labels({"adapter": name})

    def families(self, states: Sequence[AdapterState]) -> Iterator[GaugeMetricFamily]:
        """Where they are and what they take; those that share a label are added up."""
        with self._lock:
            label = self._used if len(states) <= self._limit else self._labels.of
            labelled = [(label(state.name), state) for state in states]
        yield _sums("bytes", "What it takes in memory", ["adapter"], (((label,), s.num_bytes) for label, s in labelled))
        yield _sums("pinned", "Whether it is pinned", ["adapter"], (((label,), s.is_pinned) for label, s in labelled))
        yield _sums(
            "residency",
            "Whether it is there: on the device, in the host's memory beside it, or in its files alone",
            ["adapter", "tier"],
            (((label, tier), s.tier == tier) for label, s in labelled for tier in TIERS),
        )

    def _count(self, counter: Counter, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                counter.labels(self._used(name)).inc()

    def _used(self, name: str) -> str:
        """Its label, whose counts begin at zero: a rate needs that."""
        label = self._labels.used(name)
        if label not in self._shown:
            self._shown.add(label)
            for outcome in Outcome:
                self._generations.labels(label, outcome)
                self._poolings.labels(label, outcome)
            for counter in (self._hits, self._misses, self._load_failures, self._evictions):
                counter.labels(label)
        return label

    def _observe(self, label: str, record: GenerationRecord) -> None:
        self._generations.labels(label, record.outcome).inc()
        self._generated_tokens.labels(label).inc(record.num_generated_tokens)
        self._observe_any(label, record)
        if record.seconds_to_first is not None:
            self._to_first.labels(label).observe(record.seconds_to_first)
        if record.outcome is Outcome.COMPLETED and record.seconds_per_token is not None:
            self._per_token.labels(label).observe(record.seconds_per_token)

    def _observe_any(self, label: str, record: Record) -> None:
        self._prompt_tokens.labels(label).inc(record.num_prompt_tokens)
        self._awaited.labels(label).observe(record.seconds_for_adapters)
        if record.seconds_queued is not None:
            self._queued.labels(label).observe(record.seconds_queued)


def _sums(
    name: str, documentation: str, labels: Sequence[str], values: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    sums: dict[tuple[str, ...], float] = {}
    for key, value in values:
        sums[key] = sums.get(key, 0) + value
    family = GaugeMetricFamily(f"swaplora_adapter_{name}", documentation, labels=labels)
    for key, total in sums.items():
        family.add_metric(key, total)
    return family
