"""What those of the last priority, evaluations, may have of the steps of others. Imports no torch.

While others run they have rows in a step now and then, a few at a time, as long as these take no more than a share of
the time: of a step's time each row counts as much as any other. So they cost a live token less than that share, since a
row more beside others takes less time than its share of the step. Alone they have all that there is, and while others
wait for memory that they may hold: so it is soon free.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

from swaplora_server.engine.request import LAST_PRIORITY, Sequence
from swaplora_server.engine.scheduling.batch import ScheduledRows

SHARE = 1 / 16  # of the time of steps that others are in
NUM_ROWS = 16  # in one of these: more would make a longer gap between two tokens of others


class Background:
    """Owns the account of the time that they have had. Only the scheduler calls it; times are `time.monotonic()`'s."""

    def __init__(self) -> None:
        self._owed = 0.0  # seconds that others have yet to run alone
        self._began: float | None = None  # when the last step did
        self._part = 0.0  # of its rows, theirs, as far as they count
        self._has_all = False  # of that step, and owes nothing for it
        self._held_up: dict[object, Callable[[], bool]] = {}  # who may be by the memory that they hold

    @contextmanager
    def hurried_while(self, is_held_up: Callable[[], bool]) -> Iterator[None]:
        """Let them have all that there is in steps that begin when this says so. Any thread may call it."""
        key = object()
        self._held_up[key] = is_held_up
        try:
            yield
        finally:
            del self._held_up[key]

    def num_rows(self, now: float, running: Iterable[Sequence], most: int) -> int:
        """How many rows they may have in the step that begins now: few where others run, `most` alone or hurried."""
        seconds = 0.0 if self._began is None else now - self._began
        self._owed = max(0.0, self._owed + seconds * (self._part / SHARE - (1 - self._part)))
        self._began, self._part = now, 0.0
        are_beside = any(other.priority != LAST_PRIORITY and not other.is_held for other in running)
        self._has_all = not are_beside or any(is_held_up() for is_held_up in tuple(self._held_up.values()))
        if self._has_all:
            self._owed = 0.0
            return most
        return 0 if self._owed else NUM_ROWS

    def note(self, chosen: Collection[ScheduledRows]) -> None:
        """The rows of the step that has begun."""
        whole = sum(rows.num_rows for rows in chosen)
        theirs = sum(rows.num_rows for rows in chosen if rows.sequence.priority == LAST_PRIORITY)
        self._part = theirs / whole if whole and not self._has_all else 0.0
