"""The LoRA operation on a GPU: two launches for up to `GROUP` modules that share their input, however many adapters.

Importing this needs triton: see `require_triton`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from swaplora_server.kernels.cuda import lora_kernels
from swaplora_server.kernels.cuda.adapter_tables import AdapterTables, tables_of
from swaplora_server.kernels.cuda.lora_shapes import GROUP, PROGRAMS_PER_PROCESSOR, SLICE, expand_launch, shrink_launch
from swaplora_server.kernels.cuda.lora_tiles import Capacity, Tiles, tiles_of
from swaplora_server.kernels.step import Ints, Segments

ALIGNMENT = 16  # elements of a row, and bytes of an address


class CudaLora:
    """See `LoraStep`; for rows in `dtype` on one device, over the segments that it was given last.

    Its buffers keep their addresses, so that a graph which has captured `add` adds for the segments of `hold`.
    """

    def __init__(self, capacity: Capacity, dtype: torch.dtype, device: torch.device) -> None:
        """Of no segments yet."""
        self._capacity = capacity
        self._dtype = dtype
        self._programs = (_num_programs(device),)
        self._host = torch.zeros(capacity.num_words, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._plan = torch.zeros(capacity.num_words, dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._tables: Sequence[AdapterTables] = ()

    @classmethod
    def of(cls, segments: Segments, dtype: torch.dtype, device: torch.device) -> "CudaLora":
        """Of these alone, in buffers of their size."""
        tables = tables_of(segments.adapters, dtype)
        tiles = _tiles_of(segments, tables)
        lora = cls(tiles.needs, dtype, device)
        lora._hold(tiles, tables)
        return lora

    def hold(self, segments: Segments) -> None:
        """Of these from now on, once the copy before is done. On CapacityError it holds what it held."""
        tables = tables_of(segments.adapters, self._dtype)
        self._hold(_tiles_of(segments, tables), tables)

    def _hold(self, tiles: Tiles, tables: Sequence[AdapterTables]) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        words: Ints = self._host.numpy()
        tiles.write(words, self._capacity)
        self._plan.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._tables = tables  # the plan points into them

    def add(self, x: Tensor, outputs: Sequence[tuple[Tensor, int]]) -> None:
        """See `LoraStep`."""
        for rows in (x, *(y for y, _ in outputs)):
            if rows.dtype != self._dtype or not _has_plain_rows(rows):
                raise ValueError(f"rows in {rows.dtype} of strides {rows.stride()}, where plain {self._dtype} is added")
        for first in range(0, len(outputs), GROUP):
            self._add(x, outputs[first : first + GROUP])

    def _add(self, x: Tensor, outputs: Sequence[tuple[Tensor, int]]) -> None:
        num_planes = -(-x.shape[1] // SLICE)
        h = x.new_empty(num_planes * len(outputs) * self._capacity.h_elements, dtype=torch.float32)
        plan = (self._plan, self._capacity.first_entry_word, h, self._capacity.h_elements, len(outputs))
        absent = GROUP - len(outputs)
        ys = [y for y, _ in outputs] + [outputs[0][0]] * absent
        numbers = [number for _, number in outputs] + [0] * absent
        widths = [y.shape[1] for y, _ in outputs] + [0] * absent
        shrink = shrink_launch(_name(self._dtype), is_aligned=_is_aligned(x))
        lora_kernels.lora_shrink[self._programs](x, *plan, x.stride(0), x.shape[1], *numbers, **shrink.options)
        expand = expand_launch(_name(self._dtype), is_aligned=all(_is_aligned(y) for y in ys))
        strides = [y.stride(0) for y in ys]
        lora_kernels.lora_expand[self._programs](*ys, *plan, num_planes, *widths, *strides, *numbers, **expand.options)


def _tiles_of(segments: Segments, tables: Sequence[AdapterTables]) -> Tiles:
    addresses, widths = ([getattr(each, name) for each in tables] for name in ("address", "width"))
    return tiles_of(segments, np.array(addresses, np.int64), np.array(widths, np.int64))


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
