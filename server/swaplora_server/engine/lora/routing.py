"""Each run of rows through its own module: the base's, or the one that the rows' adapter has in its place."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swaplora_server.kernels.step import Segments

_NOTHING: Mapping[str, Any] = {}


class ReplacedRows(NamedTuple):
    """Rows `start` to `stop` go through `module`, which is an adapter's own (PEFT's `modules_to_save`)."""

    start: int
    stop: int
    module: nn.Module


def replaced_rows(segments: Segments, path: str) -> Sequence[ReplacedRows]:
    """Runs of rows that do not go through the base's module at `path`."""
    if not len(segments.replacing):
        return ()
    own = ((segment, segment.weights.replaced.get(path)) for segment in segments.replacing)
    return [ReplacedRows(segment.start, segment.stop, module) for segment, module in own if module is not None]


def routed(
    base: nn.Module,
    replaced: Sequence[ReplacedRows],
    dim: int,
    inputs: tuple[Any, ...],
    options: Mapping[str, Any] = _NOTHING,
) -> Any:
    """What `base` makes of its rows, and each module in its place of those that it has `replaced`.

    `replaced` are in the order of their rows and do not overlap; the rows are dimension `dim` of every tensor.
    """
    if not replaced:
        return base(*inputs, **options)
    num_rows = inputs[0].shape[dim]
    outputs, reached = [], 0
    for start, stop, module in (*replaced, ReplacedRows(num_rows, num_rows, base)):
        for first, last, chosen in ((reached, start, base), (start, stop, module)):
            if first < last:
                outputs.append(
                    chosen(
                        *(_cut(x, dim, first, last) for x in inputs),
                        **{name: _cut(x, dim, first, last) for name, x in options.items()},
                    )
                )
        reached = stop
    return outputs[0] if len(outputs) == 1 else _joined(outputs, dim)


def _joined(outputs: list[Any], dim: int) -> Any:
    """One after the other; a router's outputs are tuples of tensors."""
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(parts, dim) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs, dim)


def _cut(value: Any, dim: int, start: int, stop: int) -> Any:
    return value.narrow(dim, start, stop - start) if isinstance(value, Tensor) else value
