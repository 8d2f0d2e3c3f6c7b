"""The fused decoder: all layers of a model of Llama's kind in one native call, a step spent in kernels alone.

The model's own code stays around it: embedding, rope angles, final norm and output head. The layers keep their packed
linears and their numbers, so adapters apply as they do anywhere else. The kernel is csrc/decoder.cpp.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_server.kernels.backend import RunningStep
from swaplora_server.kernels.cpu import build
from swaplora_server.kernels.cpu.adapter_tables import tables_of
from swaplora_server.kernels.cpu.attention import CpuStep, LayerCache
from swaplora_server.kernels.cpu.linear import CpuLinear, LinearWeight
from swaplora_server.kernels.rows import LayerAttention, Segment, StepRows

_SOURCE = build.CSRC / "decoder.cpp"
# layers that are computed as decoder.cpp says, and nothing else
_KNOWN = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NUM_LINEARS = len(_ATTENTION) + len(_MLP)
_NORMS = (("input_layernorm",), ("post_attention_layernorm",), ("self_attn", "q_norm"), ("self_attn", "k_norm"))


class _Kernels(ctypes.Structure):
    _fields_ = (("linear", ctypes.c_void_p), ("lora", ctypes.c_void_p), ("attention", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("linears", ctypes.POINTER(LinearWeight) * _NUM_LINEARS),
        ("numbers", ctypes.c_int64 * _NUM_LINEARS),
        ("norms", ctypes.c_void_p * len(_NORMS)),
        ("norm_numbers", ctypes.c_int64 * len(_NORMS)),
        ("eps", ctypes.c_double),
        ("cache", LayerCache),
    )


class _ReplacedRows(ctypes.Structure):
    _fields_ = (("start", ctypes.c_int64), ("stop", ctypes.c_int64), ("modules", ctypes.POINTER(ctypes.c_void_p)))


class _Rows(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("segments", ctypes.c_void_p),
        ("num_segments", ctypes.c_int64),
        ("replaced", ctypes.c_void_p),
        ("num_replaced", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("tokens", _Rows),
        ("head", _Rows),
        ("logits_to_keep", ctypes.c_void_p),
        ("hidden_size", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("num_runs", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


def load_library(cache_dir: Path, report: Callable[[str], None]) -> ctypes.CDLL:
    """The compiled code. Raises NoCompilerError."""
    library = build.load(_SOURCE, cache_dir, report)
    library.decode.restype = None
    library.decode.argtypes = [
        ctypes.POINTER(_Kernels),
        ctypes.POINTER(_Layer),
        ctypes.c_int64,
        ctypes.POINTER(_Step),
    ]
    return library


def wrap(
    library: ctypes.CDLL,
    model: PreTrainedModel,
    running: Callable[[], RunningStep],
    *,
    lora: ctypes.CDLL,
    paged_attention: ctypes.CDLL,
    linear: ctypes.CDLL,
) -> Callable[[], None] | None:
    """Exchange the layers of `model` for one native call, if they are of a known kind; what undoes it, or None.

    See `Backend.wrap`.
    """
    decoder: Any = model.get_decoder()
    layers = decoder.layers if isinstance(getattr(decoder, "layers", None), nn.ModuleList) else None
    if layers is None or not all(_is_known(layer) for layer in layers):
        return None
    kernels = _Kernels(
        *(
            ctypes.cast(function, ctypes.c_void_p)
            for function in (linear.linear_f32, lora.lora_delta_f32, paged_attention.paged_attention_f32)
        )
    )
    decoder.layers = nn.ModuleList([CpuDecoder(library, kernels, list(layers), running)])
    return lambda: setattr(decoder, "layers", layers)


def _is_known(layer: Any) -> bool:
    if type(layer).__name__ not in _KNOWN:
        return False
    has_silu = type(layer.mlp.act_fn).__name__ in {"SiLU", "SiLUActivation"}
    are_packed = all(isinstance(linear.base, CpuLinear) for linear in _linears(layer))
    return has_silu and are_packed


def _linears(layer: Any) -> Iterator[Any]:
    yield from (getattr(layer.self_attn, name) for name in _ATTENTION)
    yield from (getattr(layer.mlp, name) for name in _MLP)


class CpuDecoder(nn.Module):
    """Stands in for all layers of a decoder."""

    def __init__(
        self,
        library: ctypes.CDLL,
        kernels: _Kernels,
        layers: list[Any],
        running: Callable[[], RunningStep],
    ) -> None:
        super().__init__()
        self._decode = library.decode
        self._kernels = kernels
        self._layers = layers  # a plain list: the model's other code is not to see them
        self._running = running
        self._attention = [_attention_of(layer) for layer in layers]
        self._entries = (_Layer * len(layers))(*map(_entry, layers))
        self._cached_for: object = None

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_others: object) -> Tensor:
        """hidden_states: [1, num_rows, hidden_size] → the same after every layer, in the rows that reach the head."""
        adapters, step = self._running()
        if not isinstance(step, CpuStep):
            raise RuntimeError("a fused decoder ran over another backend's cache")
        self._point_at(step)
        hidden = hidden_states.clone()
        cos, sin = (angles.contiguous() for angles in position_embeddings)
        runs = step.table.runs
        logits_to_keep = (ctypes.c_int64 * len(adapters.logits_to_keep))(*adapters.logits_to_keep)
        replaced = [_replaced(rows.replacing) for rows in (adapters.tokens, adapters.head)]
        self._decode(
            self._kernels,
            self._entries,
            len(self._entries),
            _Step(
                _rows(hidden.shape[1], adapters.tokens, replaced[0]),
                _rows(len(logits_to_keep), adapters.head, replaced[1]),
                ctypes.addressof(logits_to_keep),
                hidden.shape[2],
                hidden.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                ctypes.addressof(runs),
                len(runs),
                torch.get_num_threads(),
            ),
        )
        return hidden

    def _point_at(self, step: CpuStep) -> None:
        """Every layer at its part of the cache, which stays the same from step to step."""
        if step.kv is self._cached_for:
            return
        for entry, layer, attention in zip(self._entries, self._layers, self._attention, strict=True):
            head_dim = layer.self_attn.head_dim
            num_kv_heads = layer.self_attn.k_proj.out_features // head_dim
            like = torch.empty(num_kv_heads, head_dim)
            entry.cache = step.kv.layer_cache(attention, layer.self_attn.q_proj.out_features // head_dim, like)
        self._cached_for = step.kv


def _replaced(segments: Sequence[Segment]) -> "ctypes.Array[_ReplacedRows]":
    replaced = (_ReplacedRows * len(segments))()
    for own, segment in zip(replaced, segments, strict=True):
        own.start, own.stop, own.modules = segment.start, segment.stop, tables_of(segment.weights).modules
    return replaced


def _rows(count: int, rows: StepRows, replaced: "ctypes.Array[_ReplacedRows]") -> _Rows:
    """Points into `rows` and `replaced`, which have to outlive it."""
    segments = rows.deltas
    return _Rows(
        count,
        None if segments is None else ctypes.addressof(segments.entries),
        0 if segments is None else len(segments.entries),
        ctypes.addressof(replaced),
        len(replaced),
    )


def _attention_of(layer: Any) -> LayerAttention:
    attn = layer.self_attn
    window = getattr(attn, "sliding_window", None)
    if type(layer).__name__ == "MistralDecoderLayer":
        window = getattr(attn.config, "sliding_window", None)
    return LayerAttention(attn.layer_idx, attn.scaling, window=window)


def _entry(layer: Any) -> _Layer:
    linears = list(_linears(layer))
    norms = [reduce(lambda module, name: getattr(module, name, None), names, layer) for names in _NORMS]
    return _Layer(
        linears=(ctypes.POINTER(LinearWeight) * _NUM_LINEARS)(
            *(ctypes.pointer(linear.base.packed) for linear in linears)
        ),
        numbers=(ctypes.c_int64 * _NUM_LINEARS)(*(linear.number for linear in linears)),
        norms=(ctypes.c_void_p * len(_NORMS))(*(norm and norm.weight.data_ptr() for norm in norms)),
        norm_numbers=(ctypes.c_int64 * len(_NORMS))(*(norm.number if norm else 0 for norm in norms)),
        eps=layer.input_layernorm.variance_epsilon,
    )
