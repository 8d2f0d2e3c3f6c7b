"""Adapters that left a device's memory and stay in the host's, to come back without being read and checked again."""

import threading
from collections import OrderedDict

from swaplora_adapters.weights.served import AdapterWeights


class HostTier:
    """At most `budget` bytes of adapters as they were before they were copied, least recently used first out."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, AdapterWeights] = OrderedDict()
        self._nbytes = 0

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
            if digest in self._kept:
                self._kept.move_to_end(digest)
            return self._kept.get(digest)

    def keep(self, weights: AdapterWeights) -> None:
        """Keep these, and let others go for them; what is larger than the whole budget is not kept."""
        with self._lock:
            self._forget(weights.digest)
            if weights.nbytes > self._budget:
                return
            self._kept[weights.digest] = weights
            self._nbytes += weights.nbytes
            while self._nbytes > self._budget:
                self._forget(next(iter(self._kept)))

    def drop(self, digest: str) -> None:
        """Forget a version that nobody will ask for again."""
        with self._lock:
            self._forget(digest)

    def _forget(self, digest: str) -> None:
        weights = self._kept.pop(digest, None)
        if weights is not None:
            self._nbytes -= weights.nbytes
