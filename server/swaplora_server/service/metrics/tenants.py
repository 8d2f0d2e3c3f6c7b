"""What is counted of each tenant, under at most so many labels: the rest share one."""

import threading
from collections import Counter
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily

from swaplora_adapters.files.naming import DEFAULT_TENANT
from swaplora_server.service.metrics.adapters import AdapterLabels
from swaplora_server.service.metrics.records import GenerationRecord

MAX_LABELLED = 64  # tenants, the first that were heard of
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class TenantMetrics:
    """How long the requests of each tenant wait, and how many of it are here. Thread-safe."""

    def __init__(self, registry: CollectorRegistry, limit: int = MAX_LABELLED) -> None:
        self._labels = AdapterLabels(lambda _tenant: True, limit)
        self._lock = threading.Lock()
        self._queued = Histogram(
            "swaplora_tenant_queue_time_seconds",
            "From the request until its prompt was begun",
            ["tenant"],
            buckets=_SECONDS,
            registry=registry,
        )

    def observe(self, record: GenerationRecord) -> None:
        """One generation is over."""
        if record.seconds_queued is not None:
            self._queued.labels(self._label(record.tenant)).observe(record.seconds_queued)

    def family(self, num_held: Mapping[str, int]) -> GaugeMetricFamily:
        """Of sequences, by tenant."""
        sums: Counter[str] = Counter()
        for tenant, count in num_held.items():
            sums[self._label(tenant)] += count
        family = GaugeMetricFamily("swaplora_tenant_sequences", "Sequences that run or wait", labels=["tenant"])
        for label, count in sums.items():
            family.add_metric([label], count)
        return family

    def _label(self, tenant: str) -> str:
        with self._lock:
            return self._labels.used(tenant or DEFAULT_TENANT)
