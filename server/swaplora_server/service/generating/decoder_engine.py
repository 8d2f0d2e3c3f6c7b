"""The engine of a base that generates: what its KV cache takes, how long a context may be, which steps are recorded."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from swaplora_server.base.base_model import BaseModel
from swaplora_server.base.decode_graphs import RecordedSteps, record_steps
from swaplora_server.base.device_memory import check_host_room, graph_bytes, left_for_kv, take_kv_cache
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.config import Settings
from swaplora_server.engine.engine import Engine
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.probe import run_largest, run_probe
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduling.scheduler import Scheduler
from swaplora_server.kernels.cuda.graphs.buckets import bucket_sizes

KV_CACHE_BYTES = 2**30  # on a CPU, unless the settings say otherwise
GPU_MEMORY_FRACTION = 0.9
SCORED_LOGITS = 2**25  # of prompts whose log-probabilities are wanted, in one step


class DecoderEngine(NamedTuple):
    """An engine that has taken its memory, and not begun."""

    engine: Engine
    kv_cache_bytes: int
    max_model_len: int
    recorded: RecordedSteps | None


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """What the settings make of a base, of whose sequences `max_rows` run at once. All raise UnsupportedModelError."""

    base: BaseModel
    settings: Settings
    max_rows: int

    def make(self) -> DecoderEngine:
        """Have the memory taken, and steps recorded."""
        settings, base, kv_bytes = self.settings, self.base, self.kv_bytes()
        if base.device.type == "cpu":
            check_host_room(kv_bytes)
        block_bytes = base.kv_bytes_per_token * settings.block_size
        pool = BlockPool(max(0, kv_bytes // block_bytes - 1), settings.block_size)
        max_len = settings.max_model_len or min(base.max_positions, pool.capacity)
        if not 2 <= max_len <= min(base.max_positions, pool.capacity):
            raise UnsupportedModelError(
                f"a context of {max_len} tokens cannot be had: the base has {base.max_positions} positions, and "
                f"--kv-cache-bytes holds {pool.capacity} tokens"
            )
        scheduler = Scheduler(
            pool,
            max_batch_tokens=settings.max_batch_tokens,
            max_num_seqs=self.max_rows,
            max_step_ranks=settings.max_step_ranks,
            max_scored_rows=self._max_scored_rows,
            prefix_cache=settings.prefix_cache,
            appends_forced=not self.records_steps,  # what is recorded computes one token of each sequence
        )
        runner = base.runner(pool.num_blocks, settings.block_size)
        engine = Engine(scheduler, runner, settings.max_step_seconds)
        run_step = partial(self._run_largest, runner, pool, min(settings.max_batch_tokens, max_len))
        run_row = partial(run_probe, runner, pool)
        take_kv_cache(run_step, run_row, base.device, kv_bytes, settings.adapter_memory_bytes)
        recorded = record_steps(base, runner, pool, self.max_rows) if self.records_steps else None
        return DecoderEngine(engine, kv_bytes, max_len, recorded)

    @property
    def _max_scored_rows(self) -> int:
        """Of prompts, in one step."""
        return max(1, SCORED_LOGITS // self.base.vocab_size)

    def _run_largest(self, runner: Runner, pool: BlockPool, num_tokens: int) -> None:
        run_largest(runner, pool, num_tokens, min(self.max_rows, num_tokens), self._max_scored_rows)

    @property
    def records_steps(self) -> bool:
        """Whether decoding steps are recorded as CUDA graphs."""
        wanted, is_cpu = self.settings.cuda_graphs, self.base.device.type == "cpu"
        if wanted is not None and is_cpu:
            raise UnsupportedModelError("--cuda-graphs says whether a GPU's steps are recorded: leave it out on a CPU")
        return wanted is not False and not is_cpu

    def kv_bytes(self) -> int:
        """As the settings say, or what there is room for."""
        settings, base = self.settings, self.base
        is_known = settings.kv_cache_bytes is not None or base.device.type == "cpu"
        if is_known and settings.gpu_memory_fraction is not None:
            raise UnsupportedModelError(
                "--gpu-memory-fraction says what of a GPU's memory the KV cache may take: leave it out on a CPU, and "
                "beside --kv-cache-bytes"
            )
        if is_known:
            return settings.kv_cache_bytes or KV_CACHE_BYTES
        num_tokens, block_size = min(settings.max_batch_tokens, base.max_positions), settings.block_size
        num_blocks = -(-num_tokens // block_size)

        def run_step() -> None:
            runner, pool = base.runner(num_blocks, block_size), BlockPool(num_blocks, block_size)
            self._run_largest(runner, pool, num_tokens)

        def record_largest() -> int:
            return base.runner(num_blocks, block_size).record([self.max_rows])

        fraction = settings.gpu_memory_fraction or GPU_MEMORY_FRACTION
        sizes = bucket_sizes(self.max_rows)
        for_graphs = graph_bytes(record_largest, base.device, len(sizes)) if self.records_steps else 0
        return left_for_kv(run_step, base.device, fraction, settings.adapter_memory_bytes, for_graphs)
