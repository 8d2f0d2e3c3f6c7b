"""A team's threads on cores of their own."""

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository import KERNEL_CACHE
from swaplora_server.kernels.cpu import abi

LIBRARY = abi.load_library(KERNEL_CACHE, lambda _message: None)


def placed(cores: list[int], allowed: list[int]) -> list[int]:
    """Where each thread belongs of a team that is on `cores`."""
    of_threads, of_process = (ctypes.c_int * len(cores))(*cores), (ctypes.c_int * len(allowed))(*allowed)
    return [LIBRARY.core_for(of_threads, len(cores), thread, of_process, len(allowed)) for thread in range(len(cores))]


@pytest.mark.parametrize(
    ("cores", "expected"),
    [([0, 1], [0, 1]), ([1, 1], [1, 0]), ([3, 3, 3], [3, 0, 1]), ([0, 2, 0, 2], [0, 2, 1, 3]), ([0, 0, 1, 2, 3], None)],
)
def test_who_shares_a_core_goes_to_one_that_nobody_has(cores: list[int], expected: list[int] | None) -> None:
    assert placed(cores, [0, 1, 2, 3]) == (expected or cores)


@given(st.data())
def test_a_team_is_as_far_apart_as_there_are_cores_and_nobody_moves_in_vain(data: st.DataObject) -> None:
    allowed = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True))
    cores = data.draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=16))
    after = placed(cores, allowed)
    assert len({*after}) == min(len(cores), len(allowed))
    assert {*after} <= {*allowed}
    assert all(after[number] == core for number, core in enumerate(cores) if core not in cores[:number])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody is moved")
def test_a_thread_that_was_moved_may_go_where_it_might_before() -> None:
    cores = os.sched_getaffinity(0)
    with ThreadPoolExecutor(1) as pool:
        for core in (*cores, max(cores) + 1):
            pool.submit(LIBRARY.move_to, core).result()
            assert pool.submit(os.sched_getaffinity, 0).result() == cores
