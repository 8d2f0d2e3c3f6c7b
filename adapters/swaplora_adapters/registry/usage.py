"""What becomes of adapters in memory, told by name to whoever counts it."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from swaplora_adapters.store.records import VersionRecord

Result = TypeVar("Result")


class UsageListener(Protocol):
    """Who is told. Each call is short, and some come with a lock held."""

    def looked_up(self, names: Sequence[str], *, were_there: bool) -> None:
        """A request wanted the weights of all these, which were in memory or could have been at once, or were not."""

    def loaded(self, name: str, stages: dict[str, float]) -> None:
        """One was brought into memory; stage → seconds that this took."""

    def load_failed(self, name: str, error: BaseException) -> None:
        """One could not be brought into memory."""

    def evicted(self, name: str) -> None:
        """One gave its memory to another."""


class Unheard:
    """A listener that nobody needs."""

    def looked_up(self, names: Sequence[str], *, were_there: bool) -> None: ...

    def loaded(self, name: str, stages: dict[str, float]) -> None: ...

    def load_failed(self, name: str, error: BaseException) -> None: ...

    def evicted(self, name: str) -> None: ...


class UsageByName:
    """Digests → the name under which each was last asked for, which is whose use it is. Thread-safe."""

    def __init__(self, listener: UsageListener) -> None:
        self._listener = listener
        self._names: dict[str, str] = {}

    def asked(self, record: VersionRecord) -> None:
        """From now on what becomes of this version is of this name."""
        self._names[record.digest] = record.name

    def forget(self, digest: str) -> None:
        """Of a version that is no more."""
        self._names.pop(digest, None)

    def looked_up(self, records: Sequence[VersionRecord], *, were_there: bool) -> None:
        self._listener.looked_up([record.name for record in records], were_there=were_there)

    def loaded(self, digest: str, stages: dict[str, float]) -> None:
        if (name := self._names.get(digest)) is not None:
            self._listener.loaded(name, stages)

    def load_failed(self, digest: str, error: BaseException) -> None:
        if (name := self._names.get(digest)) is not None:
            self._listener.load_failed(name, error)

    def evicted(self, digest: str) -> None:
        if (name := self._names.get(digest)) is not None:
            self._listener.evicted(name)


class Stages:
    """A stopwatch for what is done in stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, job: Callable[[], Result]) -> Result:
        """What `job` returns or raises."""
        began = time.monotonic()
        try:
            return job()
        finally:
            self.seconds[stage] = time.monotonic() - began
