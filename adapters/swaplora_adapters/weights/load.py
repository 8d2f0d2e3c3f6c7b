"""A file's tensors made into what is served: checked against the config and the base, alpha and rank folded in.

Files name tensors as PEFT's `save_pretrained` does: `base_model.model.<module path>.lora_A.weight`, and B likewise.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from swaplora_adapters.config.parse import read_spec
from swaplora_adapters.config.spec import HEAD_TASKS, AdapterSpec
from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.complaints import capped
from swaplora_adapters.files.tensorfile import Header, RawHeader, iter_tensors, parse_header, read_raw_header
from swaplora_adapters.fit.base import BaseLayers
from swaplora_adapters.fit.fit import Layout, fitted
from swaplora_adapters.priority import pause
from swaplora_adapters.weights.embeddings import build_embedding
from swaplora_adapters.weights.linears import build_linear
from swaplora_adapters.weights.materialise import materialise
from swaplora_adapters.weights.memory import HugePages, Scratch, mapping_bytes
from swaplora_adapters.weights.module_copy import with_tensors
from swaplora_adapters.weights.parts import Parts, gather
from swaplora_adapters.weights.placement import Place, Placement, as_built, placed, plain
from swaplora_adapters.weights.replacements import build_replacement
from swaplora_adapters.weights.served import AdapterWeights, EmbeddingWeights, LinearWeights

Content = LinearWeights | EmbeddingWeights | nn.Module
_NUM_KEPT, _LONGEST_KEPT = 8, 1 << 20  # headers, and bytes of one; a layout takes several times as many


def check_fit(spec: AdapterSpec, header: Header, layers: BaseLayers, max_work: int | None = None) -> Layout:
    """Raise unless every tensor has a place in the base, and everything that the config asks for its tensors.

    `max_work` bounds what patterns may cost; what was let in is never asked again whether it keeps to that. Raises
    InvalidAdapterError with every complaint.
    """
    pause()
    return fitted(spec, layers, {name: info.shape for name, info in header.tensors.items()}, max_work)


class Fits:
    """How files fit a base. The last ones are kept: adapters that were trained alike have the same header."""

    def __init__(self, layers: BaseLayers) -> None:
        self._layers = layers
        self._kept = lru_cache(_NUM_KEPT)(self._find)

    def find(self, spec: AdapterSpec, raw: RawHeader) -> tuple[Header, Layout]:
        """What `parse_header` and `check_fit` make of both; raises what they do. Any thread may ask."""
        return self._find(spec, raw) if len(raw.content) > _LONGEST_KEPT else self._kept(spec, raw)

    def _find(self, spec: AdapterSpec, raw: RawHeader) -> tuple[Header, Layout]:
        header = parse_header(raw)
        return header, check_fit(spec, header, self._layers)


def load_weights(
    digest: str,
    config_path: Path,
    weights_path: Path,
    layers: BaseLayers,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement | None = None,
    fits: Fits | None = None,
) -> AdapterWeights:
    """Turn an adapter's two files into weights to serve: on `device`, alpha and rank folded into B.

    On a CPU they lie in one piece of memory, if they take what their file does; `placement` says how those of linears
    lie there, as plain tensors without it. They are of `dtype`, or bfloat16 where the file's are and nothing is lost by
    it. Holds one module's tensors raw. `fits` are of these `layers`. Raises like `read_spec` and `check_fit`, and
    InvalidAdapterError for values that are not finite or overflow `dtype`, or that would have to be the base's own and
    are not.
    """
    header, layout = (fits or Fits(layers)).find(read_spec(config_path), read_raw_header(weights_path))
    num_bytes = mapping_bytes(_num_bytes(math.prod(info.shape), info.dtype, dtype) for info in header.tensors.values())
    return _assemble(digest, layout, iter_tensors(weights_path, header), num_bytes, dtype, device, placement)


class Survey(NamedTuple):
    """What an adapter will be in memory."""

    rank: int
    paths: tuple[str, ...]
    num_parameters: int
    has_effect: bool  # whether it changes anything


def survey_values(
    layout: Layout, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, placement: Placement | None = None
) -> Survey:
    """Build all of it once, keeping nothing, for a file that passed `check_fit`. Raises like `load_weights`.

    `placement` is the one by which it will be loaded.
    """
    rank, num_parameters, has_effect, paths = 0, 0, False, []
    place = as_built if placement is None or layout.spec.materialise else placement(Scratch())
    for parts, content in _built(layout, tensors, dtype, place):
        has_effect = has_effect or parts.has_effect
        paths.append(parts.path)
        is_materialised = layout.spec.materialise and parts.path not in HEAD_TASKS
        num_parameters += _num_materialised(parts, layout.layers) if is_materialised else _num_elements(content)
        rank = max(rank, 0 if isinstance(content, nn.Module) else content.rank)
    return Survey(rank, tuple(paths), num_parameters, has_effect)


def _num_materialised(parts: Parts, layers: BaseLayers) -> int:
    """Elements of a module of its own; the bias is counted where there may be one."""
    if shape := layers.linears.get(parts.path):
        return shape.out_features * (shape.in_features + 1)
    if table := layers.embeddings.get(parts.path):
        return table.num_embeddings * table.embedding_dim
    return sum(map(math.prod, layers.others[parts.path].values()))


def _num_elements(content: Content) -> int:
    if isinstance(content, nn.Module):
        return sum(tensor.numel() for tensor in (*content.parameters(), *content.buffers()))
    return sum(tensor.numel() for tensor in content.tensors)


def _num_bytes(num_elements: int, of_file: torch.dtype, dtype: torch.dtype) -> int:
    return num_elements * (of_file if of_file == torch.bfloat16 else dtype).itemsize


def _assemble(
    digest: str,
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    num_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement | None,
) -> AdapterWeights:
    """`num_bytes`: about what all of it takes; on a CPU it is laid into pieces of memory of that size."""
    pages = HugePages(mapping_bytes=num_bytes)
    put = partial(placed, device=device, pages=pages)
    if placement is None or layout.spec.materialise:  # what is materialised is served by no kernel of factors
        placement = partial(plain, device)
    modules: dict[str, LinearWeights] = {}
    embeddings: dict[str, EmbeddingWeights] = {}
    replaced: dict[str, nn.Module] = {}
    head: nn.Module | None = None
    for parts, content in _built(layout, tensors, dtype, placement(pages)):
        if isinstance(content, EmbeddingWeights):
            embeddings[parts.path] = _placed_embedding(content, put)
        elif isinstance(content, nn.Module) and parts.path in HEAD_TASKS:
            head = with_tensors(content, lambda tensor: tensor.to(device))
        elif isinstance(content, nn.Module):
            replaced[parts.path] = with_tensors(content, lambda tensor: tensor.to(device))
        else:
            modules[parts.path] = _placed_linear(content, put)
    weights = AdapterWeights(
        digest,
        MappingProxyType(modules),
        MappingProxyType(embeddings),
        MappingProxyType(replaced),
        layout.spec.alora_invocation_tokens,
        head,
        layout.spec.id2label,
    )
    return materialise(weights, layout.layers) if layout.spec.materialise else weights


def _built(
    layout: Layout, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, place: Place
) -> Iterator[tuple[Parts, Content]]:
    """Each module as it is served; once all are through, raise InvalidAdapterError if there were complaints."""
    complaints: list[str] = []
    for parts in gather(layout, tensors, dtype):
        content = _build(parts, place)
        complaints += parts.complaints
        if content is not None and not complaints:
            yield parts, content
    if complaints:
        raise InvalidAdapterError(capped(list(dict.fromkeys(complaints))))


def _build(parts: Parts, place: Place) -> Content | None:
    if not parts.tensors:
        return None  # there was but a copy of the base's own
    is_whole = any(part.startswith("parameter.") for part in parts.tensors)
    if is_whole or parts.path in parts.layout.layers.others or parts.path in HEAD_TASKS:
        return build_replacement(parts)
    return build_embedding(parts) if parts.path in parts.layout.layers.embeddings else build_linear(parts, place)


def _placed_linear(linear: LinearWeights, put: Callable[[Tensor], Tensor]) -> LinearWeights:
    """Its factors lie where they are to be already."""
    if linear.column_scale is None and linear.shift is None:
        return linear
    column_scale, shift = (None if vector is None else put(vector) for vector in (linear.column_scale, linear.shift))
    return linear.with_vectors(column_scale, shift)


def _placed_embedding(embedding: EmbeddingWeights, put: Callable[[Tensor], Tensor]) -> EmbeddingWeights:
    rows = {"token_ids": embedding.token_ids, "token_rows": embedding.token_rows}
    own = {name: put(tensor) for name, tensor in rows.items() if tensor is not None}
    return EmbeddingWeights(put(embedding.lora_A), put(embedding.lora_B), **own)
