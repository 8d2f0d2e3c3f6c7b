"""Which processors OpenMP's threads run on."""

import ctypes
import os

import torch

_TOLD_BY = {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"}


def bind_team(library: ctypes.CDLL) -> None:
    """Give this thread and each of its OpenMP team a processor of its own, where the team takes all that there are.

    A parallel region is as slow as its slowest thread: where another thread runs on one of the processors, the system
    may leave two of the team on the other, in turns, for as long as a step. The variables by which OpenMP is told where
    its threads run come first.
    """
    if hasattr(os, "sched_getaffinity") and not _TOLD_BY & os.environ.keys():
        processors = sorted(os.sched_getaffinity(0))
        if 1 < len(processors) == torch.get_num_threads():
            library.bind_team((ctypes.c_int * len(processors))(*processors), len(processors))
