"""How work beside the steps of a model gives way to them: threads that come last, and turns between two steps."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

NICENESS = 10  # beside a busy engine it gets a tenth of a core
SHARE_OF_LOADS = 1 / 4  # of a step's time, that follows it where a load waits, and a request for the load
_SHARE = 1 / 8  # the same, where nobody but uploads and the like wait
_LONGEST_WAIT_SECONDS = 0.1  # a step that takes longer computes prompts: what comes of it is late already
_LEAST_WORK_SECONDS = 0.001  # of the processor's time between two waits, however short of it a thread is
_WORK_IN_LONG_STEPS_SECONDS = (
    SHARE_OF_LOADS * _LONGEST_WAIT_SECONDS
)  # the same, after a wait that no step's end has ended
_IDLE_SECONDS = 0.002  # who has not paused for so long has done, or is at something without pauses


class Turns:
    """Between the thread that runs steps and those that load and check adapters beside it.

    A step takes all processors, and between its native parts the GIL. Whoever works beside it, however low, makes it
    wait: the system leaves two of its threads on one processor, or the GIL with a thread that it does not run. So
    the others work off pieces of less than a millisecond between two steps, and wait at a `pause` while there is one.
    """

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._is_open.set()
        self._lock = threading.Lock()
        self._num_steps = 0
        self._shares: list[float] = []  # of a step's time, that those who wait ask for
        self._last_pause = 0.0

    @property
    def is_open(self) -> bool:
        """Whether nobody would wait."""
        return self._is_open.is_set()

    @property
    def num_waiting(self) -> int:
        """How many wait for the end of a step."""
        return len(self._shares)

    def wait(self, share: float = _SHARE) -> bool:
        """Return when no step runs, or after a tenth of a second; says which. `share` of the step is then asked for."""
        with self._lock:
            self._shares.append(share)
        is_open = self._is_open.wait(_LONGEST_WAIT_SECONDS)
        with self._lock:
            self._shares.remove(share)
        return is_open

    def note_pause(self) -> None:
        """Somebody is at work."""
        self._last_pause = time.monotonic()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step, and behind it a turn for those who wait: a share of its time, or until they have done."""
        began = time.monotonic()
        self._begin()
        try:
            yield
        finally:
            share = self._end()
        if share:
            ended = time.monotonic()
            self._give_turn(ended + share * (ended - began))

    def _begin(self) -> None:
        with self._lock:
            self._num_steps += 1
            self._is_open.clear()

    def _end(self) -> float:
        """The largest share that is asked for, 0 where nobody waits."""
        with self._lock:
            self._num_steps -= 1
            share = max(self._shares, default=0.0)
            if not self._num_steps:
                self._is_open.set()
        return share

    def _give_turn(self, end: float) -> None:
        self.note_pause()
        while (now := time.monotonic()) < min(end, self._last_pause + _IDLE_SECONDS):
            time.sleep(min(end - now, _IDLE_SECONDS))


TURNS = Turns()  # of this process, whose threads share its processors and the GIL


class _Low(threading.local):
    """What a thread knows of itself."""

    is_low = False
    share = _SHARE  # of a step's time, that it asks for
    works_until = 0.0  # on its processor time, before it waits again


_mine = _Low()


def lower_priority(share: float = _SHARE) -> None:
    """Have this thread `pause`, and come after the process's first one, where threads have a priority of their own.

    `share` of a step's time is its turn behind one that it waited for.
    """
    _mine.is_low = True
    _mine.share = share
    if sys.platform == "linux":
        come_after(os.getpid())


def pause() -> None:
    """Between two pieces of work: where this thread is of low priority, have it wait for its turn."""
    if not _mine.is_low:
        return
    if not TURNS.is_open and time.thread_time() >= _mine.works_until:
        work = _LEAST_WORK_SECONDS if TURNS.wait(_mine.share) else _WORK_IN_LONG_STEPS_SECONDS
        _mine.works_until = time.thread_time() + work
    TURNS.note_pause()


def come_after(process: int) -> None:
    """Have whoever calls, a thread on Linux and elsewhere its process, come after `process`, whatever it inherited."""
    wanted = os.getpriority(os.PRIO_PROCESS, process) + NICENESS
    os.setpriority(os.PRIO_PROCESS, 0, min(19, max(wanted, os.getpriority(os.PRIO_PROCESS, 0))))
