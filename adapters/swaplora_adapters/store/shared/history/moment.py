"""Moments between which it is known how long it was, also where the process or the machine has slept meanwhile."""

import time
from typing import NamedTuple


class Moment(NamedTuple):
    """As two clocks have it: one that does not count every sleep, and one that may be set."""

    awake: float
    wall: float

    @classmethod
    def now(cls) -> "Moment":
        return cls(time.clock_gettime(time.CLOCK_BOOTTIME), time.time())

    def seconds_to(self, later: "Moment") -> float:
        """The longer of what they say."""
        return max(later.awake - self.awake, abs(later.wall - self.wall))
