"""Memory for weights in large pages, where the system has them: a step reads it all, and looks fewer addresses up."""

import mmap
from bisect import insort
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_ALIGNMENT = 64
_SLACK = 64  # bytes behind the last tensor of a mapping


def mapping_bytes(sizes: Iterable[int]) -> int:
    """What one mapping needs for tensors of these sizes in bytes."""
    return sum(map(aligned, sizes)) + _SLACK


def aligned(num_bytes: int) -> int:
    """`num_bytes` in whole cache lines."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def pinned(num_bytes: int) -> Tensor:
    """[num_bytes], uint8, that a GPU reads by itself. Raises RuntimeError where the system gives none.

    Registered by itself: torch's own pinned memory comes in powers of two, up to twice of what was asked for.
    """
    mapping = _Registered(-1, num_bytes, flags=_FLAGS)
    _in_large_pages(mapping)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    failed = runtime.cudaHostRegister(memory.data_ptr(), num_bytes, 0)
    if int(failed):
        with suppress(RuntimeError, AssertionError):
            torch.zeros(1, device="cuda")  # who launches something next is told of what went wrong before
        torch.cuda.check_error(failed)
    mapping.unregister = partial(runtime.cudaHostUnregister, memory.data_ptr())
    return memory


class _Registered(mmap.mmap):
    """Pages that CUDA forgets before the system has them back: or it would copy from them whoever has them next."""

    unregister: Callable[[], object] = staticmethod(lambda: None)

    def __del__(self) -> None:
        self.unregister()


class Span(NamedTuple):
    """Bytes `start` to `stop` of an arena."""

    start: int
    stop: int


class Arena:
    """One piece of memory from which spans are taken, each the first that fits, and given back to their neighbours."""

    def __init__(self, memory: Tensor) -> None:
        """memory: [num_bytes], uint8."""
        self.memory = memory
        self._free = [Span(0, len(memory))]  # ascending, none beside another

    def take(self, num_bytes: int) -> Span | None:
        """So many in whole cache lines; None where there are not so many in one."""
        size = aligned(num_bytes)
        for number, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[number : number + 1] = [Span(start + size, stop)] * (start + size < stop)
                return Span(start, start + size)
        return None

    def give_back(self, span: Span) -> None:
        """A span that was taken, of which nothing is read any more."""
        insort(self._free, span)
        joined = self._free[:1]
        for free in self._free[1:]:
            if joined[-1].stop == free.start:
                joined[-1] = Span(joined[-1].start, free.stop)
            else:
                joined.append(free)
        self._free = [free for free in joined if free.start < free.stop]

    @property
    def num_free(self) -> int:
        """Bytes, in however many spans."""
        return sum(stop - start for start, stop in self._free)


class HugePages:
    """Tensors cut one after the other from large mappings. Each mapping lives as long as any tensor in it."""

    def __init__(self, mapping_bytes: int = 64 << 20) -> None:
        self._mapping_bytes = mapping_bytes
        self._mapping: mmap.mmap | None = None
        self._offset = 0

    def empty(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """[num_elements], not filled in; aligned to a cache line, and the 64 bytes behind it can be read."""
        num_bytes = num_elements * dtype.itemsize
        if not num_bytes:
            return torch.empty(0, dtype=dtype)
        if self._mapping is None or self._offset + num_bytes + _SLACK > len(self._mapping):
            self._mapping, self._offset = _mapping(max(num_bytes + _SLACK, self._mapping_bytes)), 0
        tensor = torch.frombuffer(self._mapping, dtype=dtype, count=num_elements, offset=self._offset)
        self._offset += aligned(num_bytes)
        return tensor


class Scratch(HugePages):
    """The same memory again and again, for what nobody keeps: it is in the processor's caches."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def empty(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """As of any pages, but what was given before is overwritten."""
        num_bytes = num_elements * dtype.itemsize
        if num_bytes + _SLACK > len(self._memory):
            self._memory = torch.empty(num_bytes + _SLACK, dtype=torch.uint8)
        return self._memory[:num_bytes].view(dtype)


def _mapping(num_bytes: int) -> mmap.mmap:
    """Pages that nobody writes to take no memory."""
    return _in_large_pages(mmap.mmap(-1, num_bytes, flags=_FLAGS))


def _in_large_pages(memory: mmap.mmap) -> mmap.mmap:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
