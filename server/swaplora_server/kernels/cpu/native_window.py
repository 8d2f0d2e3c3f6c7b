"""When the Python of loads may run beside steps: while a step is in native code, and while there is none."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST_WAIT_SECONDS = 1.0  # a step that takes so long computes prompts, and has no tokens to be late with


class NativeWindow:
    """Opened and closed by the thread that runs steps; any other waits for it.

    Python has one lock for all threads of a process. A step needs it dozens of times between its native calls, and
    each time a load has it, the step waits until the system lets the load's thread, which comes last, give it back.
    """

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._is_open.set()
        self._in_step = self._has_native_code = False

    @property
    def is_open(self) -> bool:
        """Whether nobody would wait."""
        return self._is_open.is_set()

    def wait(self) -> None:
        """Return when a step is in native code, when none runs, or after a second."""
        self._is_open.wait(_LONGEST_WAIT_SECONDS)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step, and what is decided before and after it. It stays open where the last one had no `native` part."""
        self._in_step = True
        if self._has_native_code:
            self._is_open.clear()
        self._has_native_code = False
        try:
            yield
        finally:
            self._in_step = False
            self._is_open.set()

    @contextmanager
    def native(self) -> Iterator[None]:
        """Native code that takes most of a step and needs no Python. Changes nothing outside of a step."""
        self._has_native_code = self._in_step
        self._is_open.set()
        try:
            yield
        finally:
            if self._in_step:
                self._is_open.clear()
