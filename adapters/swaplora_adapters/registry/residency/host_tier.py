"""Adapters that left a device's memory and stay in the host's, to come back without being read and checked again."""

import threading
from collections import OrderedDict
from typing import NamedTuple

from swaplora_adapters.weights.device_copy import Layout, moved
from swaplora_adapters.weights.memory import Arena, Span, aligned
from swaplora_adapters.weights.served import AdapterWeights


class _Kept(NamedTuple):
    weights: AdapterWeights
    span: Span | None  # of the arena, where they lie in one


class HostTier:
    """At most `budget` bytes of adapters as they were before they were copied, least recently used first out.

    With an `arena`, of pinned memory, they are laid into it as they will lie on the device. Its spans are written by
    `keep` alone, on the thread that also copies from them.
    """

    def __init__(self, budget: int, arena: Arena | None = None) -> None:
        self._budget = budget
        self._arena = arena
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._nbytes = 0
        self._filled: Span | None = None  # what `keep` lays something into just now

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._kept

    def find(self, digest: str) -> AdapterWeights | None:
        """What is kept of a digest, and now the most recently used."""
        with self._lock:
            kept = self._kept.get(digest)
            if kept is None:
                return None
            self._kept.move_to_end(digest)
            return kept.weights

    def keep(self, weights: AdapterWeights) -> AdapterWeights:
        """Keep these, and let others go for them: they are returned where they lie now.

        What is larger than the whole budget, as it is or as it would lie, is not kept, and stays where it is.
        """
        arena = self._arena
        layout = Layout(tensor for tensor in weights.all_tensors if arena and tensor.device.type == "cpu")
        with self._lock:
            self._forget(weights.digest)
            is_too_large = arena is not None and aligned(layout.num_bytes) > len(arena.memory)
            if is_too_large or weights.nbytes > self._budget:
                return weights
            while self._nbytes + weights.nbytes > self._budget:
                self._forget(next(iter(self._kept)))
        if arena is None:
            self._add(_Kept(weights, None))
            return weights
        span = self._take(layout.num_bytes, arena)
        if span is None:
            return weights
        memory = arena.memory[span.start : span.start + layout.num_bytes]
        try:
            layout.fill(memory)
            laid = moved(weights, layout.cut(memory))
        except BaseException:
            with self._lock:
                arena.give_back(span)
                self._filled = None
            raise
        self._add(_Kept(laid, span))
        return laid

    def drop(self, digest: str) -> None:
        """Forget a version that nobody will ask for again."""
        with self._lock:
            self._forget(digest)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the arena has lent exactly what those that are kept lie in."""
        with self._lock:
            if self._arena is None:
                return
            spans = [self._filled, *(kept.span for kept in self._kept.values())]
            lent = sum(span.stop - span.start for span in spans if span is not None)
            if lent + self._arena.num_free != len(self._arena.memory):
                raise RuntimeError("the memory of the host's tier is not what its adapters lie in")

    def _take(self, num_bytes: int, arena: Arena) -> Span | None:
        """None where all that may go leaves no room in one span."""
        with self._lock:
            while (span := arena.take(num_bytes)) is None and self._kept:
                self._forget(next(iter(self._kept)))
            self._filled = span
        return span

    def _add(self, kept: _Kept) -> None:
        with self._lock:
            self._kept[kept.weights.digest] = kept
            self._nbytes += kept.weights.nbytes
            self._filled = None

    def _forget(self, digest: str) -> None:
        kept = self._kept.pop(digest, None)
        if kept is not None:
            self._nbytes -= kept.weights.nbytes
            if kept.span is not None and self._arena is not None:
                self._arena.give_back(kept.span)
