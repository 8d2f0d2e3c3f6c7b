"""A fetch that can be held up where it hurts most: when all has been read, and nothing is published yet."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from swaplora_adapters.sources.source import Sources
from swaplora_adapters.store.staging import Staging

GUARD_SECONDS = 60


class Gate:
    """Open until it is shut; counts who came to it."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._arrived = threading.Semaphore(0)
        self._open.set()

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def wait_for_one(self) -> None:
        """Until one more has come to the gate."""
        assert self._arrived.acquire(timeout=GUARD_SECONDS)

    def go_through(self) -> None:
        self._arrived.release()
        assert self._open.wait(GUARD_SECONDS)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Shut for the body."""
        while self._arrived.acquire(blocking=False):
            pass
        self.shut()
        try:
            yield
        finally:
            self.open()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """At the end of every fetch."""
    gate, fetch = Gate(), Sources.fetch

    def held(sources: Sources, uri: str, staging: Staging, **options: Any) -> str:
        fetched = fetch(sources, uri, staging, **options)
        gate.go_through()
        return fetched

    monkeypatch.setattr(Sources, "fetch", held)
    yield gate
    gate.open()
