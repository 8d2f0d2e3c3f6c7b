"""Torch's own operations as a family of kernels, on any device."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.kernels.backend import Forward, Memory, PagedKV, RunningStep
from swaplora_server.kernels.step import Segments
from swaplora_server.kernels.torch.attention import TorchKV
from swaplora_server.kernels.torch.lora import ModulesByNumber, TorchLora
from swaplora_server.kernels.torch.whole_attention import TorchWhole


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The device's own allocator, tensor by tensor."""

    device: torch.device

    def empty(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """See `Memory`."""
        return torch.empty(num_elements, dtype=dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class PlainBackend:
    """What families have in common that read weights and adapters as plain tensors in a device's own memory."""

    device: torch.device

    @property
    def products(self) -> None:
        """Rows are multiplied as they are."""

    def memory(self, _piece_bytes: int = 0) -> Memory:
        """See `Backend`."""
        return DeviceMemory(self.device)

    def linear(self, linear: nn.Module, _memory: Memory) -> nn.Module:
        """The linear itself."""
        return linear

    @property
    def placement(self) -> None:
        """Plain tensors."""

    def whole_attention(self) -> TorchWhole:
        """See `Backend`."""
        return TorchWhole()

    def stepping(self) -> AbstractContextManager[None]:
        """Nothing waits for it."""
        return nullcontext()


@dataclass(frozen=True, slots=True)
class TorchBackend(PlainBackend):
    """See `Backend`."""

    @property
    def description(self) -> str:
        """See `Backend`."""
        return "torch's operations"

    @property
    def joins(self) -> bool:
        """Each by itself."""
        return False

    def tables(self, weights: AdapterWeights, paths: Sequence[str]) -> ModulesByNumber:
        """See `Backend`."""
        return ModulesByNumber(weights, paths)

    def lora(self, segments: Segments) -> TorchLora:
        """See `Backend`."""
        return TorchLora(segments)

    def paged_kv(self, num_blocks: int, block_size: int) -> TorchKV:
        """See `Backend`."""
        return TorchKV(num_blocks, block_size, self.device)

    def graphs(self, _kv: PagedKV, _forward: Forward, _sizes: Sequence[int]) -> None:
        """Nothing is recorded."""

    def wrap(self, _model: PreTrainedModel, _running: Callable[[], RunningStep]) -> None:
        """Layers are left as they are."""
