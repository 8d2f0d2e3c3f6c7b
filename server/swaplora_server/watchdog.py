"""Notices that a thread hangs, in whatever it does."""

import threading
from collections.abc import Callable

NUM_LOOKS = 10  # in vain, until a thread counts as stuck


class Watchdog:
    """Looks from a thread of its own whether another still beats, and says so once when it does not.

    It counts its looks and not the time: a process that was frozen, or that got no processor, has had none of them.
    """

    def __init__(self, last_beat: Callable[[], float], seconds: float, on_stuck: Callable[[], None]) -> None:
        """`last_beat` is another number after each beat; `on_stuck` is called `seconds` after the last, or later."""
        self._last_beat = last_beat
        self._seconds = seconds
        self._on_stuck = on_stuck
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engine-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Look no more. Callable from `on_stuck`."""
        self._is_stopped.set()

    def _watch(self) -> None:
        last_beat, num_in_vain = self._last_beat(), 0
        while num_in_vain < NUM_LOOKS:
            if self._is_stopped.wait(self._seconds / NUM_LOOKS):
                return
            beat = self._last_beat()
            num_in_vain = num_in_vain + 1 if beat == last_beat else 0
            last_beat = beat
        self._on_stuck()
