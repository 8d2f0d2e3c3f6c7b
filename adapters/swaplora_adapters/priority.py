"""How work beside the steps of a model gives way to them."""

import os
import sys
from contextlib import suppress

NICENESS = 10  # beside a busy engine it gets a tenth of a core


def lower_priority() -> None:
    """Have this thread run when no other thread of its container wants the processor, where the system knows of such.

    Linux wakes a thread of a step on a processor where only such threads run as if it were idle; beside merely a lower
    one it may go on to share the processor with another thread of the step.
    """
    if sys.platform == "linux":
        come_after(os.getpid())
        with suppress(OSError):  # a sandbox may refuse it: then only the niceness stands
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def come_after(process: int) -> None:
    """Have whoever calls, a thread on Linux and elsewhere its process, come after `process`, whatever it inherited."""
    wanted = os.getpriority(os.PRIO_PROCESS, process) + NICENESS
    os.setpriority(os.PRIO_PROCESS, 0, min(19, max(wanted, os.getpriority(os.PRIO_PROCESS, 0))))
