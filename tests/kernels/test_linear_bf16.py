"""The linear of bfloat16 products: against float64, against the order of sums that it is said to have, row by row."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repository import KERNEL_CACHE
from swaplora_adapters.weights.memory import HugePages
from swaplora_server.kernels.cpu import abi, build
from swaplora_server.kernels.cpu import linear as cpu_linear
from swaplora_server.kernels.cpu.linear import CpuLinear

LIBRARY = abi.load_library(KERNEL_CACHE, lambda _message: None)
SHAPES = [(1, 1), (7, 5), (31, 33), (32, 48), (64, 17), (300, 49), (576, 192), (513, 100)]
NUM_ROWS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 140]


def pack(plain: nn.Module, products: torch.dtype = torch.bfloat16) -> CpuLinear:
    packed = cpu_linear.pack(LIBRARY, products, plain, HugePages())
    assert isinstance(packed, CpuLinear)
    return packed


def job_of(packed: CpuLinear, y: Tensor) -> abi.LinearJob:
    return abi.LinearJob(ctypes.pointer(packed.packed), y.data_ptr())


def linear(shape: tuple[int, int], *, bias: bool = True, scale: float = 1.0) -> nn.Linear:
    made = nn.Linear(*shape, bias=bias)
    made.weight.data.mul_(scale)
    return made


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_product_of_rounded_numbers(shape: tuple[int, int], has_bias: bool) -> None:
    plain = linear(shape, bias=has_bias)
    packed = pack(plain)
    weight = plain.weight.detach().bfloat16().double()
    for num_rows in NUM_ROWS:
        x = torch.randn(1, num_rows, shape[0])
        exact = x.bfloat16().double() @ weight.T + (plain.bias.detach().double() if has_bias else 0)
        torch.testing.assert_close(packed(x).double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_packed_can_be_read(shape: tuple[int, int]) -> None:
    plain = linear(shape)
    packed = pack(plain)
    rounded = plain.weight.detach().bfloat16().float()
    assert torch.equal(packed.dense(), rounded)
    numbers = torch.tensor([0, shape[1] - 1, shape[1] // 2])
    assert torch.equal(packed.rows(numbers), rounded[numbers])


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("shape", [(576, 192), (1536, 96), (33, 31)])
def test_a_row_is_bit_for_bit_the_same_alone_and_among_any_others(num_rows: int, shape: tuple[int, int]) -> None:
    packed, x = pack(linear(shape)), torch.randn(num_rows, shape[0])
    together = packed(x)
    for row in range(num_rows):
        assert torch.equal(packed(x[row : row + 1])[0], together[row])


def test_neither_threads_nor_company_in_a_call_change_the_result() -> None:
    first, second, x = pack(linear((576, 192))), pack(linear((576, 100))), torch.randn(70, 576)
    expected = [first(x), second(x)]
    for threads in (1, 2, 3):
        outputs = [torch.full_like(y, float("nan")) for y in expected]
        jobs = (abi.LinearJob * 2)(job_of(first, outputs[0]), job_of(second, outputs[1]))
        LIBRARY.linear(x.data_ptr(), 70, 576, jobs, 2, None, 0, threads)
        assert all(map(torch.equal, outputs, expected))


def test_formats_share_a_call() -> None:
    plain, x = linear((96, 50)), torch.randn(5, 96)
    exact = pack(plain, torch.float32)
    packed = pack(plain)
    outputs = [torch.empty(5, 50) for _ in range(3)]
    jobs = (abi.LinearJob * 3)(*map(job_of, (packed, exact, packed), outputs))
    LIBRARY.linear(x.data_ptr(), 5, 96, jobs, 3, None, 0, 2)
    assert all(map(torch.equal, outputs, (packed(x), exact(x), packed(x))))


def test_rows_of_nan_or_infinity_leave_the_others_alone() -> None:
    packed, x = pack(linear((576, 60))), torch.randn(20, 576)
    expected = packed(x)
    x[3], x[17] = float("nan"), float("inf")
    y = packed(x)
    others = [row for row in range(20) if row not in (3, 17)]
    assert torch.equal(y[others], expected[others])
    assert not y[[3, 17]].isfinite().any()


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_rows_of_another_type_are_refused(products: torch.dtype) -> None:
    with pytest.raises(TypeError, match="rows of float32"):
        pack(linear((32, 16)), products)(torch.randn(2, 32).bfloat16())


def by_definition(x: Tensor, weight: Tensor, has_tiles: bool) -> Tensor:
    """The sum of csrc/products.h, rounding after rounding; x: [rows, in], weight: [out, in], whole blocks of 32."""
    xs, ws = (each.bfloat16().float().numpy() for each in (x, weight))
    xs, ws = (np.where(np.abs(each) < 2.0**-126, 0 * each, each) for each in (xs, ws))
    total = np.zeros((len(xs), len(ws)), np.float32)
    for start in range(0, xs.shape[1], 32):
        low, high = np.zeros_like(total), np.zeros_like(total)
        for k in range(start, start + 32, 2):
            if has_tiles:
                low, high = fma(xs, ws, k, low), fma(xs, ws, k + 1, high)
            else:
                total = fma(xs, ws, k, fma(xs, ws, k + 1, total))
        if has_tiles:
            total = flushed(total + flushed(low + high))
    return torch.from_numpy(total)


def fma(xs: np.ndarray, ws: np.ndarray, k: int, total: np.ndarray) -> np.ndarray:
    """A product of two bfloat16 is exact in float64, and so is its sum with what is not too far apart from it."""
    exact = np.outer(xs[:, k].astype(np.longdouble), ws[:, k].astype(np.longdouble)) + total
    return flushed(exact.astype(np.float32))


def flushed(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) < 2.0**-126, 0 * values, values)


@pytest.mark.parametrize("scale", [1.0, 1e-17, 1e-19])
def test_sums_are_in_the_order_that_the_processor_has(scale: float) -> None:
    plain = linear((96, 20), bias=False, scale=scale)
    x = torch.randn(5, 96) * scale
    expected = by_definition(x, plain.weight.detach(), build.variant().has_tiles)
    assert torch.equal(pack(plain)(x), expected)


@settings(max_examples=60, deadline=None)
@given(
    num_in=st.integers(1, 130),
    num_out=st.integers(1, 110),
    num_rows=st.integers(1, 70),
    seed=st.integers(0, 2**16),
)
def test_any_shape(num_in: int, num_out: int, num_rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    plain, x = linear((num_in, num_out)), torch.randn(num_rows, num_in)
    exact = x.bfloat16().double() @ plain.weight.detach().bfloat16().double().T + plain.bias.detach().double()
    torch.testing.assert_close(pack(plain)(x).double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", [1, 20, 140])
@pytest.mark.parametrize("size", [(), (0, 65), (1 << 20,)])
def test_asking_for_other_memory_meanwhile_changes_nothing(rows: int, size: tuple[int, ...]) -> None:
    packed, x = pack(linear((576, 192))), torch.randn(rows, 576)
    others = [torch.zeros(each, dtype=torch.uint8) for each in size]
    spans = (abi.Span * len(size))(*(abi.Span(other.data_ptr(), other.nbytes) for other in others))
    y = torch.empty(rows, 192)
    job = job_of(packed, y)
    LIBRARY.linear(x.data_ptr(), rows, 576, job, 1, ctypes.addressof(spans), len(spans), 2)
    assert torch.equal(y, packed(x))
