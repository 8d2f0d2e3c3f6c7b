"""Whether anybody still waits for some work, so that it ends when nobody does."""

import threading
from collections.abc import Callable


class AbandonedError(Exception):
    """The work was given up: nobody waits for it any more, and so nobody hears of this."""


class Interest:
    """How many wait. Once the last has gone it is lost for good, and who does the work is told. Thread-safe."""

    def __init__(self) -> None:
        """One waits."""
        self._lock = threading.Lock()
        self._num_waiting = 1
        self._to_tell: list[Callable[[], object]] = []

    @property
    def is_lost(self) -> bool:
        return not self._num_waiting

    def check(self) -> None:
        """Raise AbandonedError if it is lost."""
        if self.is_lost:
            raise AbandonedError

    def join(self) -> bool:
        """Let one more wait; false if it is lost already."""
        with self._lock:
            if self.is_lost:
                return False
            self._num_waiting += 1
            return True

    def leave(self) -> None:
        """Let one less wait."""
        with self._lock:
            self._num_waiting -= 1
            told = self._to_tell if self.is_lost else []
        for tell in told:
            tell()

    def when_lost(self, tell: Callable[[], object]) -> None:
        """Have `tell` called once it is lost, on the thread of who left last; now, if that was before."""
        with self._lock:
            self._to_tell.append(tell)
            is_late = self.is_lost
        if is_late:
            tell()
