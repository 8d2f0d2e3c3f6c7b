"""The fused decoder: all layers of a model of Llama's kind in one native call, a step spent in kernels alone.

The model's own code stays around it: embedding, rope angles, final norm and output head. The layers keep their packed
linears and their numbers, so adapters apply as they do anywhere else. The kernel is csrc/decoder.cpp.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_server.kernels.backend import RunningStep, StepRows
from swaplora_server.kernels.cpu.abi import NUM_LINEARS, DecoderLayer, LinearWeight, ReplacedRows, Rows, Step
from swaplora_server.kernels.cpu.adapter_tables import tables_of
from swaplora_server.kernels.cpu.attention import CpuStep
from swaplora_server.kernels.cpu.linear import CpuLinear
from swaplora_server.kernels.cpu.lora import CpuLora
from swaplora_server.kernels.cpu.quantised_linear import QuantisedLinear
from swaplora_server.kernels.llama_like import Parts, all_parts_of
from swaplora_server.kernels.step import Segments


def wrap(
    library: ctypes.CDLL, dtype: torch.dtype, model: PreTrainedModel, running: Callable[[], RunningStep]
) -> Callable[[], None] | None:
    """Exchange the layers of `model` for one native call, if they are of a known kind; what undoes it, or None.

    `dtype` is the number format of products. See `Backend.wrap`.
    """
    decoder: Any = model.get_decoder()
    layers, parts = getattr(decoder, "layers", None), all_parts_of(decoder)
    if parts is None or not all(map(_are_packed, parts)):
        return None
    decoder.layers = nn.ModuleList([CpuDecoder(library, dtype, parts, running)])
    return lambda: setattr(decoder, "layers", layers)


def _are_packed(parts: Parts) -> bool:
    return all(isinstance(linear.base, CpuLinear | QuantisedLinear) for linear in parts.linears)


class CpuDecoder(nn.Module):
    """Stands in for all layers of a decoder."""

    def __init__(
        self,
        library: ctypes.CDLL,
        dtype: torch.dtype,
        layers: list[Parts],
        running: Callable[[], RunningStep],
    ) -> None:
        super().__init__()
        self._decode = library.decode
        self._is_bf16 = dtype == torch.bfloat16
        self._layers = layers
        self._running = running
        self._entries = (DecoderLayer * len(layers))(*map(_entry, layers))
        self._cached_for: object = None

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_others: object) -> Tensor:
        """hidden_states: [1, num_rows, hidden_size] → the same after every layer, in the rows that reach the head."""
        step = self._running()
        if not isinstance(step.paged, CpuStep):
            raise RuntimeError("a fused decoder ran over another backend's cache")
        if hidden_states.dtype != torch.float32:
            raise TypeError(f"a fused decoder takes rows of float32, not of {hidden_states.dtype}")
        self._point_at(step.paged)
        hidden = hidden_states.clone()
        cos, sin = (angles.contiguous() for angles in position_embeddings)
        runs, head_rows = step.paged.table, step.plan.head_rows
        replaced = [replaced_of(rows.segments.replacing) for rows in (step.tokens, step.head)]
        native_step = Step(
            rows_of(hidden.shape[1], step.tokens, replaced[0]),
            rows_of(len(head_rows), step.head, replaced[1]),
            head_rows.ctypes.data,
            hidden.shape[2],
            hidden.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            runs.address,
            len(runs),
            torch.get_num_threads(),
            self._is_bf16,
        )
        self._decode(self._entries, len(self._entries), native_step)
        return hidden

    def _point_at(self, step: CpuStep) -> None:
        """Every layer at its part of the cache, which stays the same from step to step."""
        if step.kv is self._cached_for:
            return
        for entry, layer in zip(self._entries, self._layers, strict=True):
            like = torch.empty(layer.num_kv_heads, layer.head_dim)
            entry.cache = step.kv.layer_cache(layer.attention, layer.num_heads, like)
        self._cached_for = step.kv


def replaced_of(segments: Segments) -> "ctypes.Array[ReplacedRows]":
    """Where adapters have modules of their own."""
    replaced = (ReplacedRows * len(segments))()
    for own, segment in zip(replaced, segments, strict=True):
        own.start, own.stop, own.modules = segment.start, segment.stop, tables_of(segment.weights).modules
    return replaced


def rows_of(count: int, rows: StepRows, replaced: "ctypes.Array[ReplacedRows]") -> Rows:
    """As kernels of fused layers read them. Points into `rows` and `replaced`, which have to outlive it."""
    lora = rows.lora
    if lora is not None and not isinstance(lora, CpuLora):
        raise RuntimeError("a fused decoder ran with another backend's LoRA operation")
    return Rows(
        count,
        None if lora is None else ctypes.addressof(lora.entries),
        0 if lora is None else len(lora.entries),
        ctypes.addressof(replaced),
        len(replaced),
    )


def _entry(parts: Parts) -> DecoderLayer:
    linears, norms = parts.linears, parts.norms
    return DecoderLayer(
        linears=(ctypes.POINTER(LinearWeight) * NUM_LINEARS)(
            *(ctypes.pointer(linear.base.packed) for linear in linears)
        ),
        numbers=(ctypes.c_int64 * NUM_LINEARS)(*(linear.number for linear in linears)),
        norms=(ctypes.c_void_p * len(norms))(*(norm and norm.weight.data_ptr() for norm in norms)),
        norm_numbers=(ctypes.c_int64 * len(norms))(*(norm.number if norm else 0 for norm in norms)),
        eps=parts.eps,
    )
