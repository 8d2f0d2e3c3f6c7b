"""Residencies of adapters that have no files: loads are counted, held and failed as a test tells."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from swaplora_adapters.registry.residency.claims import Claim
from swaplora_adapters.registry.residency.residency import Residency
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights

SIZE = 40


class Loader:
    """Counts loads, and holds or fails them as told."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.may_load = threading.Event()
        self.may_load.set()
        self.is_loading = threading.Event()
        self.failures: dict[str, Exception] = {}
        self.reported: list[BaseException] = []

    def __call__(self, digest: str) -> AdapterWeights:
        self.is_loading.set()
        self.may_load.wait(30)
        self.loaded.append(digest)
        if digest in self.failures:
            raise self.failures[digest]
        as_large_as_told = ModuleWeights(torch.zeros(100, 5), torch.zeros(5, 100))
        return AdapterWeights(digest, {"m": as_large_as_told})


class Make:
    """Residencies of one loader, by budget."""

    def __init__(self, loader: Loader, stack: ExitStack) -> None:
        self._loader = loader
        self._stack = stack

    def __call__(self, budget: int, wait_seconds: float = 30.0) -> Residency:
        residency = Residency(self._loader, budget, wait_seconds, self._loader.reported.append)
        return self._stack.enter_context(_resident(residency))


@contextmanager
def _resident(residency: Residency) -> Iterator[Residency]:
    """Checked and closed, whatever happened."""
    try:
        yield residency
        residency.check_integrity()
    finally:
        residency.close()


def claim(residency: Residency, *digests: str, size: int = SIZE) -> Claim:
    """What a request for all these does, each of them `size` bytes."""
    return residency.retain(dict.fromkeys(digests, size))


def use(residency: Residency, *digests: str) -> None:
    """A whole request."""
    held = claim(residency, *digests)
    held.weights.result(30)
    residency.release(held)


def wait_state(residency: Residency, digest: str, state: str) -> None:
    """Return once it is in that state; fail if that takes suspiciously long."""
    deadline = time.monotonic() + 30
    while residency.state(digest)[0] != state:
        assert time.monotonic() < deadline, f"{digest} is {residency.state(digest)}, and not {state}"
        time.sleep(0.005)
