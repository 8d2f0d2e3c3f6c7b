"""Native code as a family of kernels, for CPUs with a C++ compiler."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from swaplora_adapters.weights.memory import HugePages
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.kernels.backend import Memory, RunningStep
from swaplora_server.kernels.cpu import decoder, linear, onednn_linear, quantised_linear
from swaplora_server.kernels.cpu.adapter_tables import AdapterTables
from swaplora_server.kernels.cpu.attention import CpuKV
from swaplora_server.kernels.cpu.lora import CpuLora
from swaplora_server.kernels.quantised_codes import is_quantised
from swaplora_server.kernels.step import Segments


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """See `Backend`. `dtype` is that of the model's rows."""

    library: ctypes.CDLL
    dtype: torch.dtype

    @property
    def description(self) -> str:
        """See `Backend`."""
        return "native code"

    def memory(self, piece_bytes: int = 64 << 20) -> HugePages:
        """Large pages, where the system has them."""
        return HugePages(piece_bytes)

    def linear(self, base: nn.Module, memory: Memory) -> nn.Module:
        """A packed stand-in."""
        if is_quantised(base):
            return quantised_linear.pack(self.library, base, memory)
        if self.dtype != torch.float32:
            return onednn_linear.pack(base)
        return linear.pack(self.library, base, memory)

    def tables(self, weights: AdapterWeights, paths: Sequence[str]) -> AdapterTables:
        """See `Backend`."""
        return AdapterTables(weights, paths)

    def lora(self, segments: Segments) -> CpuLora:
        """See `Backend`."""
        return CpuLora(self.library, segments)

    def paged_kv(self, num_blocks: int, block_size: int) -> CpuKV:
        """See `Backend`."""
        return CpuKV(self.library, num_blocks, block_size, self.dtype)

    def wrap(self, model: PreTrainedModel, running: Callable[[], RunningStep]) -> Callable[[], None] | None:
        """All layers in one native call, in float32."""
        return decoder.wrap(self.library, model, running) if self.dtype == torch.float32 else None
