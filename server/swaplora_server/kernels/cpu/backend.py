"""Native code as a family of kernels, for CPUs with a C++ compiler."""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from swaplora_adapters.priority import TURNS
from swaplora_adapters.weights.memory import HugePages
from swaplora_adapters.weights.placement import Placement
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.kernels.backend import Forward, Memory, PagedKV, RunningStep
from swaplora_server.kernels.cpu import build, decoder, encoder, linear, modern_encoder, panels, quantised_linear
from swaplora_server.kernels.cpu.adapter_tables import AdapterTables
from swaplora_server.kernels.cpu.attention import CpuKV
from swaplora_server.kernels.cpu.lora import CpuLora
from swaplora_server.kernels.cpu.whole_attention import CpuWhole
from swaplora_server.kernels.quantised_codes import is_quantised
from swaplora_server.kernels.step import Segments


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """See `Backend`. Rows are float32; `dtype` is the number format that linears multiply in, float32 or bfloat16."""

    library: ctypes.CDLL
    dtype: torch.dtype

    @property
    def description(self) -> str:
        """See `Backend`."""
        variant = build.variant()
        if self.dtype == torch.float32:
            return f"float32, {variant.lanes} lanes"
        order = "AMX" if variant.has_tiles else "AVX512-bf16"
        form = order if self.library.has_bf16_instruction() else f"{order} in plain C++"
        return f"bfloat16, {form}, {variant.lanes} lanes"

    @property
    def products(self) -> torch.dtype | None:
        """See `Backend`."""
        return None if self.dtype == torch.float32 else self.dtype

    def memory(self, piece_bytes: int = 64 << 20) -> HugePages:
        """Large pages, where the system has them."""
        return HugePages(piece_bytes)

    def linear(self, base: nn.Module, memory: Memory) -> nn.Module:
        """A packed stand-in."""
        if is_quantised(base):
            return quantised_linear.pack(self.library, base, memory)
        return linear.pack(self.library, self.dtype, base, memory)

    @property
    def joins(self) -> bool:
        """Each has panels of its own."""
        return False

    @property
    def placement(self) -> Placement:
        """Panels, in the number format of the products where a file has more."""
        return panels.placement(self.library, self.dtype)

    def tables(self, weights: AdapterWeights, paths: Sequence[str]) -> AdapterTables:
        """See `Backend`."""
        return AdapterTables(self.library, self.dtype, weights, paths)

    def lora(self, segments: Segments) -> CpuLora:
        """See `Backend`."""
        return CpuLora(self.library, segments, self.dtype)

    def paged_kv(self, num_blocks: int, block_size: int) -> CpuKV:
        """See `Backend`."""
        return CpuKV(self.library, num_blocks, block_size, self.dtype)

    def whole_attention(self) -> CpuWhole:
        """Keys and values in float32, whatever the products are of."""
        return CpuWhole(self.library)

    def stepping(self) -> AbstractContextManager[None]:
        """It takes all processors: work of low priority waits for its end, and has a turn before the next."""
        return TURNS.step()

    def graphs(self, _kv: PagedKV, _forward: Forward, _sizes: Sequence[int]) -> None:
        """Nothing is recorded."""

    def wrap(self, model: PreTrainedModel, running: Callable[[], RunningStep]) -> Callable[[], None] | None:
        """All layers in one native call, or each in one."""
        given = self.library, self.dtype, model, running
        return encoder.wrap(*given) or modern_encoder.wrap(*given) or decoder.wrap(*given)
