"""The server as it stands, told when it is scraped, so that nobody has to report changes of it."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from swaplora_server.engine.snapshot import Snapshot
from swaplora_server.service.metrics.adapters import AdapterMetrics
from swaplora_server.service.metrics.records import ServerState
from swaplora_server.service.metrics.tenants import TenantMetrics
from swaplora_server.service.metrics.vllm import VllmMetrics
from swaplora_server.version import VERSION


class StateCollector(Collector):
    """Asks for the state. It comes first of all that is collected: what is deleted is gone from the rest then."""

    def __init__(
        self,
        read_state: Callable[[], ServerState | None],
        base: str,
        adapters: AdapterMetrics,
        tenants: TenantMetrics,
        vllm: VllmMetrics,
    ) -> None:
        self._read_state = read_state
        self._base = base
        self._adapters = adapters
        self._tenants = tenants
        self._vllm = vllm

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("swaplora", "This server", {"version": VERSION, "base": self._base})
        state = self._read_state()
        if state is None:
            return
        self._adapters.forget_deleted()
        yield from _engine_families(state.engine)
        yield from _prefix_cache_families(state.engine)
        yield GaugeMetricFamily("swaplora_adapter_resident_bytes", "Memory of adapters", state.resident_bytes)
        yield GaugeMetricFamily("swaplora_adapter_budget_bytes", "Memory for adapters", state.budget_bytes)
        yield GaugeMetricFamily(
            "swaplora_adapter_host_bytes", "Host memory of adapters beside a GPU's", state.host_bytes
        )
        yield from self._adapters.families(state.adapters)
        yield self._tenants.family(state.tenants)
        yield GaugeMetricFamily("swaplora_catalogue_revision", "Last change of names and aliases", state.revision)
        yield from self._vllm.state_families(state)


def _engine_families(engine: Snapshot) -> Iterator[Metric]:
    yield GaugeMetricFamily("swaplora_running_sequences", "Sequences in the batch", engine.num_running)
    yield GaugeMetricFamily("swaplora_waiting_sequences", "Sequences in the queue", engine.num_waiting)
    yield GaugeMetricFamily("swaplora_kv_blocks", "Blocks of the KV cache", engine.num_blocks)
    yield GaugeMetricFamily("swaplora_kv_blocks_free", "Blocks that are free", engine.num_free_blocks)
    yield CounterMetricFamily(
        "swaplora_isolated_failures", "Requests that failed alone in the engine", engine.num_failed_requests
    )
    yield CounterMetricFamily(
        "swaplora_preemptions", "Sequences that gave their blocks to others and began again", engine.num_preempted
    )
    steps = CounterMetricFamily("swaplora_steps", "Steps of the engine", labels=["form"])
    for form, count in engine.num_steps.items():
        steps.add_metric([form], count)
    yield steps


def _prefix_cache_families(engine: Snapshot) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "swaplora_kv_blocks_cached", "Blocks that later prompts can begin with", engine.num_cached_blocks
    )
    looked_up, hit = engine.num_looked_up_tokens, engine.num_hit_tokens
    yield CounterMetricFamily("swaplora_prefix_cache_queried_tokens", "Prompt tokens looked up", looked_up)
    yield CounterMetricFamily("swaplora_prefix_cache_hit_tokens", "Of them those found", hit)
