"""The packed linear against torch's, over ragged shapes; rows that depend on no neighbours; threads kept apart."""

import ctypes
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from repository import KERNEL_CACHE
from swaplora_adapters.weights.memory import HugePages
from swaplora_server.kernels.cpu import abi, build
from swaplora_server.kernels.cpu import linear as cpu_linear

LIBRARY = abi.load_library(KERNEL_CACHE, lambda _message: None)
PACK = partial(cpu_linear.pack, LIBRARY, torch.float32, pages=HugePages())
SHAPES = [(1, 1), (7, 5), (16, 16), (31, 33), (64, 17), (300, 48), (576, 192), (513, 100)]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_torchs_linear(shape: tuple[int, int], has_bias: bool) -> None:
    linear = nn.Linear(*shape, bias=has_bias)
    packed = PACK(linear)
    for num_rows in (1, 2, 3, 5, 6, 7, 16, 24, 25, 131, 132, 133, 140):
        x = torch.randn(1, num_rows, shape[0])
        torch.testing.assert_close(packed(x), linear(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_conv1d_is_packed_as_the_transposed_linear_that_it_is() -> None:
    conv = Conv1D(40, 24)
    x = torch.randn(3, 24)
    torch.testing.assert_close(PACK(conv)(x), conv(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 16, 31, 32, 33, 70, 200])
@pytest.mark.parametrize("shape", [(576, 192), (1536, 576), (33, 31)])
def test_a_row_is_bit_for_bit_the_same_alone_and_among_any_others(num_rows: int, shape: tuple[int, int]) -> None:
    packed = PACK(nn.Linear(*shape))
    x = torch.randn(num_rows, shape[0])
    together = packed(x)
    for row in range(num_rows):
        assert torch.equal(packed(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("num_rows", [1, 7, 16, 140])
@pytest.mark.parametrize("sizes", [(), (0,), (1, 0, 0, 65), (100, 1 << 16, 0), (0, 1 << 20)])
def test_asking_for_other_memory_meanwhile_changes_nothing(num_rows: int, sizes: tuple[int, ...]) -> None:
    packed, x = PACK(nn.Linear(576, 192)), torch.randn(num_rows, 576)
    others = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    spans = (abi.Span * len(sizes))(*(abi.Span(other.data_ptr(), other.nbytes) for other in others))
    y = torch.empty(num_rows, 192)
    job = abi.LinearJob(ctypes.pointer(packed.packed), y.data_ptr())
    LIBRARY.linear(x.data_ptr(), num_rows, 576, job, 1, ctypes.addressof(spans), len(spans), 2)
    assert torch.equal(y, packed(x))


def test_threads_do_not_change_the_result() -> None:
    packed, x = PACK(nn.Linear(576, 192)), torch.randn(20, 576)
    expected = packed(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(packed(x), expected)
    finally:
        torch.set_num_threads(threads)


def test_tensors_in_huge_pages_share_no_byte_and_outlive_their_giver() -> None:
    pages = HugePages(mapping_bytes=1 << 12)
    tensors = [pages.empty(size, torch.int32).fill_(size) for size in (3, 1000, 1, 16, 5000, 7)]
    del pages
    assert [(len(tensor), bool((tensor == len(tensor)).all())) for tensor in tensors] == [
        (size, True) for size in (3, 1000, 1, 16, 5000, 7)
    ]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def placed(cores: list[int], allowed: list[int]) -> list[int]:
    """Where each thread belongs of a team that is on `cores`."""
    of_threads, of_process = (ctypes.c_int * len(cores))(*cores), (ctypes.c_int * len(allowed))(*allowed)
    return [LIBRARY.core_for(of_threads, len(cores), thread, of_process, len(allowed)) for thread in range(len(cores))]


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        ([0, 1], [0, 1]),
        ([1, 1], [1, 2]),
        ([3, 3, 3], [3, 0, 1]),
        ([0, 2, 0, 2], [0, 2, 1, 3]),
        ([0, 0, 1, 2, 3], None),
        ([3, 3], [3, 0]),
    ],
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
            assert pool.submit(LIBRARY.move_to, core).result() == (core in cores)
            assert pool.submit(os.sched_getaffinity, 0).result() == cores
        narrow = {min(cores)}
        pool.submit(os.sched_setaffinity, 0, narrow).result()
        for core in cores:
            assert pool.submit(LIBRARY.move_to, core).result() == (core in narrow)
            assert pool.submit(os.sched_getaffinity, 0).result() == narrow


FAKE = r"""
#include <sched.h>
extern "C" {
unsigned long cpuset = 3, asked = ~0ul;  // of the first 64 cores
int is_blind = 0, num_asked = 0;
static thread_local int at = 0;
int fake_get(int, size_t, cpu_set_t* set) noexcept {
    CPU_ZERO(set);
    for (int core = 0; core < 64; core++)
        if (cpuset & asked & 1ul << core) CPU_SET(core, set);
    return 0;
}
int fake_set(int, size_t, const cpu_set_t* set) noexcept {
    unsigned long wanted = 0;
    for (int core = 63; core >= 0; core--)
        if (CPU_ISSET(core, set)) wanted |= 1ul << core, at = cpuset & 1ul << core ? core : at;
    if (!(wanted & cpuset)) return -1;
    __atomic_add_fetch(&num_asked, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&asked, wanted, __ATOMIC_SEQ_CST);
    return 0;
}
int fake_cpu() noexcept { return is_blind ? 0 : at; }
}
void keep_apart(int threads);
extern "C" void part(int threads) { keep_apart(threads); }
"""


@pytest.fixture(scope="module")
def cores(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """What moves threads, on a kernel that keeps what was asked for and cuts it to the cpuset, as Linux 6.2 does."""
    folder = tmp_path_factory.mktemp("cores")
    (folder / "fake.cpp").write_text(FAKE)
    names = {"sched_getaffinity": "fake_get", "sched_setaffinity": "fake_set", "sched_getcpu": "fake_cpu"}
    renamed = [f"-D{name}={fake}" for name, fake in names.items()]
    sources = [str(build.CSRC / "team" / "cores.cpp"), str(folder / "fake.cpp")]
    command = ["g++", "-std=c++17", "-fopenmp", "-fPIC", "-shared", *renamed, *sources, "-o", str(folder / "cores.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "cores.so"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody is moved")
@pytest.mark.parametrize(("asked", "then"), [(0b11, 0b1111), (0b01, 0b01)])
def test_a_thread_that_was_moved_has_what_its_cpuset_gets_later_unless_it_had_less(
    cores: ctypes.CDLL, asked: int, then: int
) -> None:
    cpuset, mask = (ctypes.c_ulong.in_dll(cores, name) for name in ("cpuset", "asked"))
    cpuset.value, mask.value = 0b11, asked
    assert cores.move_to(0) == 1
    assert mask.value & cpuset.value == asked
    cpuset.value = 0b1111
    assert mask.value & cpuset.value == then


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody is moved")
def test_where_the_number_of_a_core_is_always_the_same_nobody_is_moved_for_ever(cores: ctypes.CDLL) -> None:
    cpuset, mask = (ctypes.c_ulong.in_dll(cores, name) for name in ("cpuset", "asked"))
    num_asked, is_blind = (ctypes.c_int.in_dll(cores, name) for name in ("num_asked", "is_blind"))
    cpuset.value, mask.value, is_blind.value, counts = 0b11, (1 << 64) - 1, 1, []
    for _ in range(60):
        cores.part(2)
        counts.append(num_asked.value)
        time.sleep(0.0015)
    assert counts[0] > 0
    assert counts[20] > counts[2], "it is tried more than once"
    assert counts[-1] == counts[40]
