"""The LoRA operation on a GPU: two launches for up to `GROUP` modules that share their input, however many adapters.

Mixtures, of which each row takes a share of its own, go through torch's operations, segment by segment.
Importing this needs triton: see `require_triton`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from swaplora_adapters.weights.router import Shares, Trace
from swaplora_server.kernels.cuda import lora_kernels
from swaplora_server.kernels.cuda.adapter_tables import AdapterTables, tables_of
from swaplora_server.kernels.cuda.lora_shapes import GROUP, PROGRAMS_PER_PROCESSOR, SLICE, expand_launch, shrink_launch
from swaplora_server.kernels.cuda.lora_tiles import Capacity, Tiles, tiles_of
from swaplora_server.kernels.cuda.words import Words
from swaplora_server.kernels.step import Segments
from swaplora_server.kernels.torch.lora import TorchLora

ALIGNMENT = 16  # elements of a row, and bytes of an address


class PlannedLora(NamedTuple):
    """Segments as kernels work through them, and what these read of the adapters."""

    tiles: Tiles
    tables: Sequence[AdapterTables]


def planned(segments: Segments, dtype: torch.dtype) -> PlannedLora:
    """Of prepared adapters, for rows in `dtype`. Raises RuntimeError for one that is not, and for a mixture's."""
    if any(segment.route is not None for segment in segments):
        raise RuntimeError("mixtures were to be computed by kernels that cannot")
    tables = tables_of(segments.adapters, dtype)
    addresses, widths = ([getattr(each, name) for each in tables] for name in ("address", "width"))
    return PlannedLora(tiles_of(segments, np.array(addresses, np.int64), np.array(widths, np.int64)), tables)


class CudaLora:
    """See `LoraStep`; for rows in `dtype` on one device, over the segments that it was given last.

    Its buffers keep their addresses, so that a graph which has captured `add` adds for the segments of `hold`.
    """

    def __init__(
        self, capacity: Capacity, dtype: torch.dtype, device: torch.device, words: Words | None = None
    ) -> None:
        """Of no segments yet. `words` are `capacity.num_words`, and its own unless given."""
        self._capacity = capacity
        self._dtype = dtype
        self._programs = (_num_programs(device),)
        self._words = Words.zeros(capacity.num_words, device) if words is None else words
        self._tables: Sequence[AdapterTables] = ()
        self._mixed: TorchLora | None = None

    @classmethod
    def of(cls, segments: Segments, dtype: torch.dtype, device: torch.device) -> "CudaLora":
        """Of these alone, in buffers of their size."""
        plan = planned(Segments([segment for segment in segments if segment.route is None]), dtype)
        lora = cls(plan.tiles.needs, dtype, device)
        lora.write(plan)
        lora._words.send()
        if len(segments.routed):
            lora._mixed = TorchLora(segments.routed)
        return lora

    def hold(self, segments: Segments) -> None:
        """Of these from now on. On CapacityError it holds what it held."""
        self.write(planned(segments, self._dtype))
        self._words.send()

    def write(self, plan: PlannedLora) -> None:
        """Of this, once its words are sent. Raises CapacityError, and writes nothing then."""
        plan.tiles.write(self._words.writable(), self._capacity)
        self._tables = plan.tables  # the words point into them

    def add(self, x: Tensor, outputs: Sequence[tuple[Tensor, int]]) -> None:
        """See `LoraStep`."""
        for rows in (x, *(y for y, _ in outputs)):
            if rows.dtype != self._dtype or not _has_plain_rows(rows):
                raise ValueError(f"rows in {rows.dtype} of strides {rows.stride()}, where plain {self._dtype} is added")
        if self._mixed is not None:
            self._mixed.add(x, outputs)
        for first in range(0, len(outputs) if self._tables or self._mixed is None else 0, GROUP):
            self._add(x, outputs[first : first + GROUP])

    def shares(self, trace: Trace) -> Shares | None:
        """See `LoraStep`."""
        return None if self._mixed is None else self._mixed.shares(trace)

    def _add(self, x: Tensor, outputs: Sequence[tuple[Tensor, int]]) -> None:
        num_planes = -(-x.shape[1] // SLICE)
        h = x.new_empty(num_planes * len(outputs) * self._capacity.h_elements, dtype=torch.float32)
        plan = (self._words.on_device, self._capacity.first_entry_word, h, self._capacity.h_elements, len(outputs))
        absent = GROUP - len(outputs)
        ys = [y for y, _ in outputs] + [outputs[0][0]] * absent
        numbers = [number for _, number in outputs] + [0] * absent
        widths = [y.shape[1] for y, _ in outputs] + [0] * absent
        shrink = shrink_launch(_name(self._dtype), is_aligned=_is_aligned(x))
        lora_kernels.lora_shrink[self._programs](x, *plan, x.stride(0), x.shape[1], *numbers, **shrink.options)
        expand = expand_launch(_name(self._dtype), is_aligned=all(_is_aligned(y) for y in ys))
        strides = [y.stride(0) for y in ys]
        lora_kernels.lora_expand[self._programs](*ys, *plan, num_planes, *widths, *strides, *numbers, **expand.options)


def _has_plain_rows(rows: Tensor) -> bool:
    return rows.shape[1] == 1 or rows.stride(1) == 1


def _is_aligned(rows: Tensor) -> bool:
    return not (rows.data_ptr() % ALIGNMENT or rows.stride(0) % ALIGNMENT or rows.shape[1] % ALIGNMENT)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _num_programs(device: torch.device) -> int:
    """As many as run at once; under Triton's interpreter, which has no device, some."""
    if device.type != "cuda":
        return 3
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
