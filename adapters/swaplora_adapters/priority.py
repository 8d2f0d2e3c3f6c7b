"""How work beside the steps of a model gives way to them."""

import os
import sys

NICENESS = 10  # beside a busy engine it gets a tenth of a core


def lower_priority() -> None:
    """Have this thread come after the process's first one, where threads have a priority of their own."""
    if sys.platform == "linux":
        come_after(os.getpid())


def come_after(process: int) -> None:
    """Have whoever calls, a thread on Linux and elsewhere its process, come after `process`, whatever it inherited."""
    wanted = os.getpriority(os.PRIO_PROCESS, process) + NICENESS
    os.setpriority(os.PRIO_PROCESS, 0, min(19, max(wanted, os.getpriority(os.PRIO_PROCESS, 0))))
