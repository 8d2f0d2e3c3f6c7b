"""Whether anybody still waits for some work, so that it ends when nobody does."""

import threading
from collections.abc import Callable


class WorkCancelledError(Exception):
    """The work was given up: nobody waits for it any more, and so nobody hears of this."""


class Cancellation:
    """How many wait. Once the last has gone it is cancelled for good, and who does the work is told. Thread-safe."""

    def __init__(self) -> None:
        """One waits."""
        self._lock = threading.Lock()
        self._num_waiting = 1
        self._to_tell: list[Callable[[], object]] = []

    @property
    def is_cancelled(self) -> bool:
        return not self._num_waiting

    def check(self) -> None:
        """Raise WorkCancelledError if it is cancelled."""
        if self.is_cancelled:
            raise WorkCancelledError

    def join(self) -> bool:
        """Let one more wait; false if it is cancelled already."""
        with self._lock:
            if self.is_cancelled:
                return False
            self._num_waiting += 1
            return True

    def leave(self) -> None:
        """Let one less wait."""
        with self._lock:
            self._num_waiting -= 1
            told = self._to_tell if self.is_cancelled else []
        for tell in told:
            tell()

    def when_cancelled(self, tell: Callable[[], object]) -> None:
        """Have `tell` called once it is cancelled, on the thread of who left last; now, if that was before."""
        with self._lock:
            self._to_tell.append(tell)
            is_late = self.is_cancelled
        if is_late:
            tell()
