"""SGMV and BGMV (Punica) for CPUs with a C++ compiler: each adapter's factors read once, sums in a fixed order.

The equation and the shapes are `LoraStep`'s; the kernels are in csrc/lora.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from swaplora_adapters.weights.router import Shares, Trace
from swaplora_server.kernels.cpu import abi
from swaplora_server.kernels.cpu.adapter_tables import tables_of
from swaplora_server.kernels.shares import TracedShares
from swaplora_server.kernels.step import Ints, Segment, Segments

# `abi.Segment`, whose pointers are numbers here
_SEGMENT = np.dtype(
    [
        *(("factors", np.int64), ("start", np.int64), ("stop", np.int64), ("scale", np.float64)),
        *(("router", np.int64), ("member", np.int64)),
    ]
)


class CpuLora:
    """See `LoraStep`; for rows on CPU in float32 or bfloat16. Products are of `dtype`, float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL, segments: Segments, dtype: torch.dtype) -> None:
        self._kernel = library.lora_delta_bf16 if dtype == torch.bfloat16 else library.lora_delta_fp32
        self._segments = segments  # the entries point into their adapters' tables
        rows = np.empty(len(segments), _SEGMENT)
        rows["factors"] = [ctypes.addressof(tables_of(weights).factors) for weights in segments.adapters]
        rows["start"], rows["stop"], rows["scale"] = segments.starts, segments.stops, segments.scales
        self._traced = TracedShares(segments)
        self._routers = _Routers(self._traced)
        places = [self._routers.place(segment) for segment in segments]
        rows["router"], rows["member"] = [address for address, _ in places], [member for _, member in places]
        self.entries = (abi.Segment * len(segments)).from_buffer(rows.data)

    def add(self, x: Tensor, outputs: Sequence[tuple[Tensor, int]]) -> None:
        """See `LoraStep`."""
        x, wide = x.float(), [y.float() for y, _ in outputs]
        modules = (abi.LoraModule * len(outputs))()
        for module, y, (_, number) in zip(modules, wide, outputs, strict=True):
            module.number, module.out, module.y = number, y.shape[1], y.data_ptr()
        self._kernel(
            self.entries,
            len(self.entries),
            modules,
            len(modules),
            x.shape[1],
            x.data_ptr(),
            torch.get_num_threads(),
        )
        for y, (narrow, _) in zip(wide, outputs, strict=True):
            if y is not narrow:
                narrow.copy_(y)

    def shares(self, trace: Trace) -> Shares | None:
        """See `LoraStep`."""
        return self._traced.find(trace)


class _Routers:
    """`abi.Router` of each mixture of a step, and what these point into."""

    def __init__(self, traced: TracedShares) -> None:
        self._traced = traced
        self._held: list[tuple[abi.Router, Ints, Shares | None]] = []

    def place(self, segment: Segment) -> tuple[int, int]:
        """The address of its router, which is the last one's unless it is its mixture's first, and its member."""
        if segment.route is None:
            return 0, 0
        router, member = segment.route.router, segment.route.member
        if member == 0:
            prototypes = np.stack([each.addresses for each in router.members], axis=1)
            shares = self._traced.of(segment)
            noted = None if shares is None else shares.ctypes.data
            made = abi.Router(prototypes.ctypes.data, len(router.members), router.top_k, router.temperature, noted)
            self._held.append((made, prototypes, shares))
        return ctypes.addressof(self._held[-1][0]), member
