"""The fused encoder: all layers of a model of BERT's kind in one native call, a step spent in kernels alone.

The model's own code stays around it: its embeddings. The layers keep their packed linears and their numbers, so
adapters apply as they do anywhere else. The kernel is csrc/encoder.cpp.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_server.kernels.backend import RunningStep
from swaplora_server.kernels.bert_like import Parts, layers_of
from swaplora_server.kernels.cpu.abi import NUM_ENCODER_LINEARS, EncoderLayer, LinearWeight, NormWeight, Rows, Step
from swaplora_server.kernels.cpu.attention import CpuStep
from swaplora_server.kernels.cpu.decoder import replaced_of, rows_of
from swaplora_server.kernels.cpu.linear import CpuLinear


def wrap(
    library: ctypes.CDLL, dtype: torch.dtype, model: PreTrainedModel, running: Callable[[], RunningStep]
) -> Callable[[], None] | None:
    """Exchange the layers of `model` for one native call, if they are of a known kind; what undoes it, or None.

    `dtype` is the number format of products. See `Backend.wrap`.
    """
    known = layers_of(model)
    if known is None:
        return None
    owner, parts = known
    layers = owner.layer
    if not all(isinstance(linear.base, CpuLinear) for one in parts for linear in one.linears):
        return None
    owner.layer = nn.ModuleList([CpuEncoder(library, dtype, parts, running)])
    return lambda: setattr(owner, "layer", layers)


class CpuEncoder(nn.Module):
    """Stands in for all layers of an encoder."""

    def __init__(
        self, library: ctypes.CDLL, dtype: torch.dtype, layers: list[Parts], running: Callable[[], RunningStep]
    ) -> None:
        super().__init__()
        self._encode = library.encode
        self._is_bf16 = dtype == torch.bfloat16
        self._layers = layers
        self._running = running
        self._entries = (EncoderLayer * len(layers))(*map(_entry, layers))
        self._cached_for: object = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: object, **__: object) -> Tensor:
        """hidden_states: [1, num_rows, hidden_size] → the same after every layer."""
        step = self._running()
        paged = checked_step(step, hidden_states, attention_mask)
        self._point_at(paged)
        hidden = hidden_states.clone()
        replaced = replaced_of(step.tokens.segments.replacing)
        tokens = rows_of(hidden.shape[1], step.tokens, replaced)
        self._encode(self._entries, len(self._entries), native_step(hidden, tokens, paged, is_bf16=self._is_bf16))
        return hidden

    def _point_at(self, step: CpuStep) -> None:
        """Every layer at the same memory, which grows with the largest step."""
        if step.kv is self._cached_for:
            return
        for entry, layer in zip(self._entries, self._layers, strict=True):
            like = torch.empty(layer.num_heads, layer.head_dim)
            entry.cache = step.kv.layer_cache(layer.attention, layer.num_heads, like)
        self._cached_for = step.kv


def checked_step(step: RunningStep, hidden_states: Tensor, attention_mask: Tensor | None) -> CpuStep:
    """What the attention of a fused encoder runs over. Raises for a step, rows or a mask that it does not take."""
    if not isinstance(step.paged, CpuStep):
        raise RuntimeError("a fused encoder ran over another backend's step")
    if hidden_states.dtype != torch.float32:
        raise TypeError(f"a fused encoder takes rows of float32, not of {hidden_states.dtype}")
    if attention_mask is not None:
        raise ValueError("a fused encoder was given a mask: inputs are told apart by their runs")
    return step.paged


def native_step(hidden: Tensor, tokens: Rows, paged: CpuStep, *, is_bf16: bool) -> Step:
    """A step over hidden [1, num_rows, hidden_size], which is written in place. Points into all that it is given."""
    return Step(
        tokens=tokens,
        hidden_size=hidden.shape[2],
        hidden=hidden.data_ptr(),
        runs=paged.table.address,
        num_runs=len(paged.table),
        threads=torch.get_num_threads(),
        is_bf16=is_bf16,
    )


def _entry(parts: Parts) -> EncoderLayer:
    linears, norms = parts.linears, parts.norms
    return EncoderLayer(
        linears=(ctypes.POINTER(LinearWeight) * NUM_ENCODER_LINEARS)(
            *(ctypes.pointer(linear.base.packed) for linear in linears)
        ),
        numbers=(ctypes.c_int64 * NUM_ENCODER_LINEARS)(*(linear.number for linear in linears)),
        norms=(NormWeight * len(norms))(*(NormWeight(norm.weight.data_ptr(), norm.bias.data_ptr()) for norm in norms)),
        norm_numbers=(ctypes.c_int64 * len(norms))(*(norm.number for norm in norms)),
        eps=norms[0].eps,
    )
