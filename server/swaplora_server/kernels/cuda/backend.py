"""Triton's kernels as a family. Importing this needs triton: see `require_triton`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.kernels.backend import Forward, PagedKV, RunningStep
from swaplora_server.kernels.cuda import decoder
from swaplora_server.kernels.cuda.adapter_tables import AdapterTables
from swaplora_server.kernels.cuda.attention import CudaKV
from swaplora_server.kernels.cuda.graphs.decoding import CudaGraphs
from swaplora_server.kernels.cuda.graphs.recorder import CudaRecorder, Recorder
from swaplora_server.kernels.cuda.lora import CudaLora
from swaplora_server.kernels.step import Segments
from swaplora_server.kernels.torch.backend import PlainBackend


@dataclass(frozen=True, slots=True)
class CudaBackend(PlainBackend):
    """See `Backend`; cuBLAS multiplies the linears. `dtype` is that of the rows."""

    dtype: torch.dtype
    recorder: Callable[[torch.device], Recorder] = CudaRecorder

    @property
    def description(self) -> str:
        """See `Backend`."""
        return "Triton"

    @property
    def joins(self) -> bool:
        """See `Backend`."""
        return True

    def tables(self, weights: AdapterWeights, paths: Sequence[str]) -> AdapterTables:
        """See `Backend`."""
        return AdapterTables(weights, paths, self.dtype, self.device)

    def lora(self, segments: Segments) -> CudaLora:
        """See `Backend`."""
        return CudaLora.of(segments, self.dtype, self.device)

    def paged_kv(self, num_blocks: int, block_size: int) -> CudaKV:
        """See `Backend`."""
        return CudaKV(num_blocks, block_size, self.device)

    def graphs(self, kv: PagedKV, forward: Forward, sizes: Sequence[int]) -> CudaGraphs:
        """See `Backend`."""
        if not isinstance(kv, CudaKV):
            raise TypeError(f"a {type(kv).__name__} is not this backend's")
        return CudaGraphs(kv, self.dtype, forward, sizes, self.recorder(self.device))

    def wrap(self, model: PreTrainedModel, running: Callable[[], RunningStep]) -> Callable[[], None] | None:
        """All layers of Llama's kind."""
        return decoder.wrap(model, running)
