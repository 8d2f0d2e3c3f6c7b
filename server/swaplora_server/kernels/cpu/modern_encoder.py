"""The fused layers of ModernBERT's kind: each in one native call, between which the model's own code does nothing.

What is said in `kernels/cpu/encoder.py` holds here too. The kernel is csrc/encoder.cpp.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_server.kernels.backend import RunningStep
from swaplora_server.kernels.cpu.abi import NUM_MODERN_LINEARS, LinearWeight, ModernLayer, NormWeight
from swaplora_server.kernels.cpu.attention import CpuStep
from swaplora_server.kernels.cpu.decoder import replaced_of, rows_of
from swaplora_server.kernels.cpu.encoder import checked_step, native_step
from swaplora_server.kernels.cpu.linear import CpuLinear
from swaplora_server.kernels.modern_like import Parts, layers_of


def wrap(
    library: ctypes.CDLL, dtype: torch.dtype, model: PreTrainedModel, running: Callable[[], RunningStep]
) -> Callable[[], None] | None:
    """Exchange each layer of `model` for a native call, if they are of a known kind; what undoes it, or None.

    `dtype` is the number format of products. See `Backend.wrap`.
    """
    parts, layers = layers_of(model), getattr(model, "layers", None)
    if parts is None or not all(isinstance(linear.base, CpuLinear) for one in parts for linear in one.linears):
        return None
    model.layers = nn.ModuleList([CpuModernLayer(library, dtype, one, running) for one in parts])
    return lambda: setattr(model, "layers", layers)


class CpuModernLayer(nn.Module):
    """Stands in for one layer."""

    def __init__(
        self, library: ctypes.CDLL, dtype: torch.dtype, parts: Parts, running: Callable[[], RunningStep]
    ) -> None:
        super().__init__()
        self.attention_type = parts.layer.attention_type  # by which the model chooses the angles
        self._encode = library.encode_modern
        self._is_bf16 = dtype == torch.bfloat16
        self._parts = parts
        self._running = running
        self._entry = _entry(parts)
        self._cached_for: object = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: object,
    ) -> Tensor:
        """hidden_states: [1, num_rows, hidden_size] → the same after the layer."""
        step = self._running()
        paged = checked_step(step, hidden_states, attention_mask)
        if position_embeddings is None:
            raise ValueError("a fused layer of ModernBERT's kind was given no angles")
        self._point_at(paged)
        hidden = hidden_states.clone()
        cos, sin = (angles.contiguous() for angles in position_embeddings)
        replaced = replaced_of(step.tokens.segments.replacing)
        tokens = rows_of(hidden.shape[1], step.tokens, replaced)
        native = native_step(hidden, tokens, paged, is_bf16=self._is_bf16)
        native.cos, native.sin = cos.data_ptr(), sin.data_ptr()
        self._encode(self._entry, native)
        return hidden

    def _point_at(self, step: CpuStep) -> None:
        """At the memory of all layers, which grows with the largest step."""
        if step.kv is self._cached_for:
            return
        like = torch.empty(self._parts.num_heads, self._parts.head_dim)
        self._entry.cache = step.kv.layer_cache(self._parts.attention, self._parts.num_heads, like)
        self._cached_for = step.kv


def _entry(parts: Parts) -> ModernLayer:
    linears, norms = parts.linears, parts.norms
    return ModernLayer(
        linears=(ctypes.POINTER(LinearWeight) * NUM_MODERN_LINEARS)(
            *(ctypes.pointer(linear.base.packed) for linear in linears)
        ),
        numbers=(ctypes.c_int64 * NUM_MODERN_LINEARS)(*(linear.number for linear in linears)),
        norms=(NormWeight * len(norms))(*(_norm(norm) for norm in norms)),
        norm_numbers=(ctypes.c_int64 * len(norms))(*(0 if norm is None else norm.number for norm in norms)),
        eps=norms[1].eps,
    )


def _norm(norm: nn.LayerNorm | None) -> NormWeight:
    """Of none, and of a bias that there is not, a null pointer."""
    if norm is None:
        return NormWeight()
    return NormWeight(norm.weight.data_ptr(), None if norm.bias is None else norm.bias.data_ptr())
