"""The fused decoder: all layers of a model of Llama's kind, what lies between their products in three kernels each.

The model's own code stays around it: embedding, rope angles and output head. The layers keep their wrapped linears, so
adapters apply as they do anywhere else. The kernels are in `rows.py`. Importing this needs triton.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_server.kernels.backend import RunningStep
from swaplora_server.kernels.cuda.attention import CudaStep
from swaplora_server.kernels.cuda.rows import LARGEST_BYTES, Heads, Span, add_norm, rope_store, silu_mul
from swaplora_server.kernels.llama_like import Parts, all_parts_of
from swaplora_server.kernels.step import Segments


def wrap(model: PreTrainedModel, running: Callable[[], RunningStep]) -> Callable[[], None] | None:
    """Exchange the layers of `model` and the norm behind them, if they are of a known kind; what undoes it, or None.

    See `Backend.wrap`.
    """
    decoder: Any = model.get_decoder()
    layers, norm, parts = getattr(decoder, "layers", None), getattr(decoder, "norm", None), all_parts_of(decoder)
    if parts is None or any(
        weight.dtype != model.dtype or weight.nbytes > LARGEST_BYTES for weight in _weights(parts, norm)
    ):
        return None

    def undo() -> None:
        decoder.layers, decoder.norm = layers, norm

    decoder.layers, decoder.norm = nn.ModuleList([CudaDecoder(parts, norm, running)]), nn.Identity()
    return undo


def _weights(layers: Sequence[Parts], norm: Any) -> list[Tensor]:
    return [each.weight for each in (norm, *(norm for parts in layers for norm in parts.norms)) if each is not None]


class CudaDecoder(nn.Module):
    """Stands in for all layers of a decoder, and for the norm behind them."""

    def __init__(self, layers: Sequence[Parts], norm: Any, running: Callable[[], RunningStep]) -> None:
        super().__init__()
        self._layers = layers
        self._norm = [norm]  # in a list: the model's other code is not to see it
        self._running = running

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_others: object) -> Tensor:
        """hidden_states: [1, num_rows, hidden_size] → the same after every layer and the last norm."""
        step = self._running()
        if not isinstance(step.paged, CudaStep):
            raise RuntimeError("a fused decoder ran over another backend's cache")
        spans = spans_of(step.tokens.segments.replacing, hidden_states.shape[1])
        hidden, delta = hidden_states[0], None
        cos, sin = (angles[0].to(hidden.dtype).contiguous() for angles in position_embeddings)
        for parts in self._layers:
            hidden, x = add_norm(hidden, delta, parts.norms[0], spans, parts.eps)
            delta = _attended(parts, step.paged, x, (cos, sin), spans)
            hidden, x = add_norm(hidden, delta, parts.norms[1], spans, parts.eps)
            gate, up, down = parts.linears[4:]
            delta = down(silu_mul(gate(x), up(x)))
        return add_norm(hidden, delta, self._norm[0], spans, self._norm[0].variance_epsilon)[1][None]


def _attended(parts: Parts, paged: CudaStep, x: Tensor, angles: tuple[Tensor, Tensor], spans: Sequence[Span]) -> Tensor:
    """x: [num_rows, hidden_size] → the same, of the layer's attention."""
    query, key, value = (linear(x) for linear in parts.linears[:3])
    layer, heads = parts.attention, Heads(parts.num_kv_heads, parts.num_heads // parts.num_kv_heads, parts.head_dim)
    stored = [rows.unflatten(1, (heads.kv_heads, heads.head_dim)) for rows in (key, value)]
    caches = paged.kv.layer(layer.layer_idx, *stored)
    turned = rope_store((query, key, value), angles, paged.slots, caches, parts.norms[2:], spans, parts.eps, heads)
    out: Tensor = parts.linears[3](paged.read(layer, turned, *stored).flatten(1))
    return out


def spans_of(replacing: Segments, num_rows: int) -> list[Span]:
    """All rows, in their order, by what their adapters replace."""
    spans, reached = [], 0
    for segment in replacing:
        spans += [Span(reached, segment.start, {}), Span(segment.start, segment.stop, segment.weights.replaced)]
        reached = segment.stop
    return [span for span in (*spans, Span(reached, num_rows, {})) if span.start < span.stop]
