"""How many sequences may be here at once, and all that a request holds from when it was let in until its end."""

import itertools
import threading
from collections.abc import Callable

from swaplora_adapters.registry.leases import Lease, RequestLeases
from swaplora_adapters.registry.registry import Registry
from swaplora_server.service.errors import RequestError


class Admission:
    """One request's part of the sequences that may be here, its leases, and memory for their weights.

    Given back in one place, exactly once, by any thread.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self._leases: list[Lease] = []
        self._request_leases: RequestLeases | None = None
        self._is_released = False

    def hold(self, lease: Lease) -> None:
        """From now on it goes back with the rest."""
        self._leases.append(lease)

    def claim_memory(self, registry: Registry) -> RequestLeases:
        """Ask for the weights of all its leases, in memory together."""
        self._request_leases = registry.lease_weights(self._leases)
        return self._request_leases

    def release(self) -> None:
        """Give back everything. Raises RuntimeError the second time: a count that is off would let too many in."""
        if self._is_released:
            raise RuntimeError("an admission was given back twice")
        self._is_released = True
        try:
            if self._request_leases is not None:
                self._request_leases.release()
            else:
                for lease in self._leases:
                    lease.release()
        finally:
            self._leave()  # last: whom nobody counts holds nothing

    def release_after(self, count: int) -> Callable[[], None]:
        """What each of `count` parts of the request calls once, at its end: the last of them gives everything back."""
        calls = itertools.count(1)
        return lambda: self.release() if next(calls) == count else None


class Admissions:
    """Lets requests in, no more than `limit` sequences at once. Any thread may ask."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.num_sequences = 0  # of requests that were let in and have not given everything back
        self._lock = threading.Lock()

    def check_number(self, n: int, num_prompts: int) -> None:
        """Raise RequestError for more sequences than can ever be here at once."""
        if n * num_prompts > self._limit:
            message = (
                f"n times the prompts is {n * num_prompts}; this server takes at most {self._limit} at once, "
                "--max-num-seqs and --max-waiting together"
            )
            raise RequestError("invalid_request", message, "n" if n > 1 else "prompt")

    def admit(self, num_sequences: int) -> Admission:
        """Raises RequestError when more would wait than the operator allows."""
        with self._lock:
            if self.num_sequences + num_sequences > self._limit:
                raise RequestError("overloaded", "too many requests are waiting; try again in a moment")
            self.num_sequences += num_sequences
        return Admission(lambda: self._leave(num_sequences))

    def _leave(self, num_sequences: int) -> None:
        with self._lock:
            self.num_sequences -= num_sequences
