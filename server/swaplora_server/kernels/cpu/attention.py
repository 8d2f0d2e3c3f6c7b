"""PagedAttention for CPUs with a C++ compiler: decode rows and prefill chunks alike, straight from their blocks.

The equation and the layout of the cache are in csrc/paged_attention.cpp.
"""

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swaplora_adapters.weights.memory import HugePages
from swaplora_server.kernels.backend import LayerAttention, PagedStep, StepInputs
from swaplora_server.kernels.cpu.abi import LayerCache
from swaplora_server.kernels.step import Runs, StepPlan
from swaplora_server.kernels.torch.attention import TorchKV
from swaplora_server.kernels.torch.whole_attention import WholeInputs

_CPU = torch.device("cpu")


class CpuKV:
    """Paged keys and values as the kernel lays them out, and torch's form for layers that it has no code for.

    `cache_dtype`: float32, or bfloat16 to round keys and values when they are stored. `is_whole`: of whole inputs, see
    `WholeAttention`.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        num_blocks: int,
        block_size: int,
        cache_dtype: torch.dtype,
        *,
        is_whole: bool = False,
    ) -> None:
        self._kernel = library.paged_attention
        self._cache_dtype = cache_dtype
        self._is_whole = is_whole
        self._pages = HugePages()
        self._slack = 2 * library.lanes()  # numbers that the last read of a small block or head may go beyond its end
        self._num_blocks = num_blocks
        self.block_size = block_size
        self._layers: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}  # by number and shape of keys
        self._torch = TorchKV(num_blocks, block_size, _CPU)

    @property
    def bytes_per_token(self) -> int:
        """Over all layers seen so far."""
        per_block = sum(cache[0].nbytes for layer in self._layers.values() for cache in layer)
        return per_block // self.block_size + self._torch.bytes_per_token

    def step(self, runs: Runs) -> "CpuStep":
        """See `PagedKV`. Raises ValueError for a row that is not to be written: the kernel writes all."""
        if runs.unwritten:
            raise ValueError("native attention writes the keys and values of every row")
        return CpuStep(self, runs)

    def begin(self, plan: StepPlan) -> "tuple[StepInputs, CpuStep]":
        """See `PagedKV`."""
        inputs = map(torch.from_numpy, (plan.token_ids, plan.runs.positions, plan.head_rows))
        return StepInputs(*inputs), self.step(plan.runs)

    def has_code_for(self, query: Tensor, value: Tensor) -> bool:
        """The kernel reads keys and values of one size."""
        return value.shape[-1] == query.shape[-1]

    def layer_cache(self, layer: LayerAttention, num_heads: int, like: Tensor) -> LayerCache:
        """One layer's cache, for keys like `like` [..., num_kv_heads, head_dim], and what it asks of its attention."""
        num_kv_heads, head_dim = like.shape[-2:]
        own = layer.layer_idx, num_kv_heads, head_dim  # of whole inputs all layers have one number
        if own not in self._layers:
            even_dim = head_dim + head_dim % 2
            self._layers[own] = (
                self._allocate(num_kv_heads * even_dim),
                self._allocate(num_kv_heads * head_dim),
            )
        keys, values = self._layers[own]
        return LayerCache(
            keys.data_ptr(),
            values.data_ptr(),
            None if layer.sinks is None else layer.sinks.data_ptr(),
            num_heads,
            num_kv_heads,
            head_dim,
            self.block_size,
            layer.window or 0,
            layer.scaling,
            layer.softcap or 0.0,
            self._cache_dtype == torch.bfloat16,
            self._is_whole,
        )

    def _allocate(self, numbers_per_token: int) -> Tensor:
        """[blocks, numbers of a block], written to: the pages are taken now, and not in the first sequences' steps."""
        shape = (self._num_blocks + 1, self.block_size * numbers_per_token)
        numel = shape[0] * shape[1]
        return self._pages.empty(numel + self._slack, self._cache_dtype)[:numel].view(shape).zero_()

    def torch_step(self, runs: Runs) -> PagedStep:
        """The step of layers that the kernel has no code for."""
        return WholeInputs(runs) if self._is_whole else self._torch.step(runs)

    def run(self, cache: LayerCache, table: "RunTable", query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """All tensors contiguous float32, shaped as in `PagedStep.attend`."""
        self._kernel(
            cache,
            table.address,
            len(table),
            *(rows.data_ptr() for rows in (query, key, value, out)),
            torch.get_num_threads(),
        )


class RunTable:
    """A step's runs as the kernel reads them, each an `abi.Run`. Points into the plan's blocks."""

    def __init__(self, runs: Runs) -> None:
        self._blocks = runs.blocks
        self._entries = runs.entries.copy()
        self._entries[:, 3] *= runs.blocks.itemsize
        self._entries[:, 3] += runs.blocks.ctypes.data
        self.address = self._entries.ctypes.data

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(slots=True)
class CpuStep:
    """One step over `kv`."""

    kv: CpuKV
    runs: Runs
    _table: RunTable | None = None
    _torch: PagedStep | None = None

    @property
    def table(self) -> RunTable:
        """Made when it is first read."""
        if self._table is None:
            self._table = RunTable(self.runs)
        return self._table

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `PagedStep`."""
        if not self.kv.has_code_for(query, value):
            if self._torch is None:
                self._torch = self.kv.torch_step(self.runs)
            return self._torch.attend(layer, query, key, value)
        if layer.sinks is not None:
            layer = replace(layer, sinks=layer.sinks.float().contiguous())
        dtype = query.dtype
        query, key, value = (rows.float().contiguous() for rows in (query, key, value))
        out = torch.empty_like(query)
        self.kv.run(self.kv.layer_cache(layer, query.shape[1], key), self.table, query, key, value, out)
        return out.to(dtype)
