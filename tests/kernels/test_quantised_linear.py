"""The packed linear of 8 and 4 bits against bitsandbytes' own, over ragged shapes, and every weight read in float32."""

from functools import partial
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from repository import KERNEL_CACHE
from swaplora_adapters.weights.memory import HugePages
from swaplora_server.base.layers import weight_of
from swaplora_server.base.quantisation import multiply_dequantised
from swaplora_server.kernels.cpu import abi, quantised_linear
from swaplora_server.kernels.cpu.abi import Format
from swaplora_server.kernels.cpu.quantised_linear import QuantisedLinear
from swaplora_server.kernels.quantised_codes import Codes

CPU = torch.device("cpu")
CACHE = KERNEL_CACHE
LIBRARY = abi.load_library(CACHE, lambda _message: None)
PACK = partial(quantised_linear.pack, LIBRARY)


def made(kind: str, num_in: int, num_out: int, bias: bool = True, **fields: Any) -> Any:
    """One of bitsandbytes' linears with random weights, quantised."""
    plain = nn.Linear(num_in, num_out, bias=bias)
    if kind == "int8":
        linear = Linear8bitLt(num_in, num_out, bias=bias, has_fp16_weights=False, threshold=6.0)
    else:
        linear = Linear4bit(num_in, num_out, bias=bias, quant_type=kind, **fields)
    linear.load_state_dict(plain.state_dict())
    linear.to(CPU)
    multiply_dequantised(linear)
    return linear


def assert_right(packed: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Within what the format's rounding of x allows, every output: weight is that of `packed`, x [num_rows, num_in].

    8 bits: x in steps of its row's largest, or 1e-30, over 63 * 2^16. 4 bits: none. Beyond that, sums in float32.
    """
    wide, rows = weight.double(), x.double()
    exact = rows @ wide.t() + (0 if bias is None else bias.double())
    is_int8 = packed.packed.format == Format.INT8
    step = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / (63 << 16) if is_int8 else 0
    allowed = 0.51 * step * wide.abs().sum(dim=1) + 1e-6 * (rows.abs() @ wide.abs().t() + exact.abs())
    error = (packed(x).double() - exact).abs()
    assert bool((error <= allowed).all()), float((error / allowed).max())


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 16), (128, 192), (96, 17), (576, 100), (33, 31), (100, 65), (4096, 70)])
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
@torch.no_grad()
def test_a_packed_linear_is_the_product_with_the_exact_weights(
    kind: str, shape: tuple[int, int], has_bias: bool
) -> None:
    linear = made(kind, *shape, has_bias)
    packed, weight = PACK(linear, HugePages()), weight_of(linear)
    for num_rows in (1, 2, 3, 5, 7, 16, 33, 170):
        x = torch.randn(num_rows, shape[0])
        assert_right(packed, x, weight, linear.bias)
        product = nn.functional.linear(x, weight)
        assert (packed(x) - linear(x)).norm() <= 1e-6 * product.norm()


@torch.no_grad()
def test_a_row_with_outliers_keeps_the_rest() -> None:
    linear, x = made("int8", 512, 48, bias=False), torch.randn(20, 512)
    x[:, 7] *= 1000
    weight, rest = weight_of(linear), x.clone()
    rest[:, 7] = 0
    error = PACK(linear, HugePages())(x).double() - x.double() @ weight.double().t()
    assert error.norm() <= 1e-3 * (rest @ weight.t()).norm()
    x[3] = 0
    x[4] *= 1e-38  # denormals
    x[5] *= 1e30
    assert_right(PACK(linear, HugePages()), x, weight)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@torch.no_grad()
def test_a_row_that_is_not_finite_gives_nothing_finite_and_leaves_others_alone(kind: str, value: float) -> None:
    packed, x = PACK(made(kind, 192, 40), HugePages()), torch.randn(9, 192)
    before = packed(x)
    x[4, 100] = value
    after = packed(x)
    assert not after[4].isfinite().any()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(after[others], before[others])


@torch.no_grad()
def test_the_widest_sums_of_8_bits_are_exact() -> None:
    """All codes at an end, and x too: 70,000 products whose sum of bytes is beyond 32 bits, but for their slices."""
    codes = torch.full((40, 70_000), 127, dtype=torch.int8)
    codes[1], codes[2], codes[3, ::2] = -127, -128, -128
    packed = QuantisedLinear(LIBRARY, HugePages(), Codes(codes, torch.ones(40, 1), None), None)
    for num_rows in (1, 17):
        x = torch.ones(num_rows, 70_000)
        x[-1, ::2] = -1
        exact = x.double() @ codes.double().t()
        torch.testing.assert_close(packed(x).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_in", [33, 34, 40, 48, 80, 96, 100, 576])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@torch.no_grad()
def test_a_scale_counts_for_its_block_where_blocks_go_on_from_one_row_to_the_next(kind: str, num_in: int) -> None:
    linear, x = made(kind, num_in, 50, bias=False, compress_statistics=False), torch.eye(num_in)
    state = linear.weight.quant_state
    halves = torch.stack([linear.weight.data.view(-1) >> 4, linear.weight.data.view(-1) & 15], dim=1).view(-1)
    scales = state.absmax.repeat_interleave(state.blocksize)
    numel = num_in * 50
    expected = (state.code[halves.int()][:numel] * scales[:numel]).view(50, num_in)
    for module in (linear, PACK(linear, HugePages())):
        torch.testing.assert_close(module(x).t(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_bfloat16_row_comes_back_as_one(kind: str) -> None:
    packed, x = PACK(made(kind, 64, 48), HugePages()), torch.randn(3, 64).bfloat16()
    assert torch.equal(packed(x), packed(x.float()).bfloat16())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_row_is_bit_for_bit_the_same_alone_and_among_any_others(kind: str) -> None:
    packed, x = PACK(made(kind, 576, 200), HugePages()), torch.randn(70, 576)
    together = packed(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(packed(x[row : row + 1])[0], together[row]) for row in range(len(x)))
        assert torch.equal(packed(x), together)
    finally:
        torch.set_num_threads(threads)


def test_weights_are_read_as_bitsandbytes_dequantises_them() -> None:
    bytes_ = made("int8", 128, 40)
    scaled = bytes_.weight.float() * bytes_.weight.SCB.unsqueeze(1).mul(1.0 / 127.0)
    assert torch.equal(weight_of(bytes_), scaled)
    assert torch.equal(weight_of(PACK(bytes_, HugePages())), scaled)
    bytes_(torch.randn(1, 128))  # moves the scales elsewhere
    assert torch.equal(weight_of(bytes_), scaled)
    for kind in ("nf4", "fp4"):
        for is_nested in (True, False):
            nibbles = made(kind, 128, 40, compress_statistics=is_nested)
            expected = dequantize_4bit(nibbles.weight.data, nibbles.weight.quant_state)
            assert torch.equal(weight_of(nibbles), expected)
            assert torch.equal(weight_of(PACK(nibbles, HugePages())), expected)


@torch.no_grad()
def test_plain_weights_are_read_in_float32_and_others_refused() -> None:
    linear, conv = nn.Linear(5, 3, dtype=torch.bfloat16), Conv1D(3, 5)
    assert torch.equal(weight_of(linear), linear.weight.float())
    assert torch.equal(weight_of(conv), conv.weight.t())
    with pytest.raises(TypeError, match="Dropout"):
        weight_of(nn.Dropout())
