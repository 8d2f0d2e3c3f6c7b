"""What lies between the products of a layer compiles for Ampere and Hopper, fits the card, and rounds as it says."""

import sys
from functools import cache
from itertools import product

import pytest

from ahead_of_time import CARDS, Compiled, Form, compile_ahead

if sys.platform == "linux":
    from swaplora_server.kernels.cuda.rows import LARGEST_BYTES, SILU_BLOCK, norm_warps

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux alone")

KERNELS = "swaplora_server.kernels.cuda.rows"
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
MAX_REGISTERS = 32 << 10  # of a program: two at once on each processor
LARGEST = 16384  # of half precision
WIDTHS = [1 << power for power in range(6, 15)]
NORMS = [size for size in product(POINTERS, WIDTHS) if size != ("float32", LARGEST)]
HEADS = [*product(POINTERS, (64, 128, 256))]
Name = tuple[str, str, int]


def norm(dtype: str, width: int, *, has_delta: bool) -> Form:
    tensors = dict.fromkeys(("hidden", "delta", "weight", "summed", "out"), POINTERS[dtype])
    constants = {"HAS_DELTA": int(has_delta), "WIDTH": width, "BLOCK": width}
    types = {**tensors, "first": "i32", "eps": "fp32"}
    return Form(f"{KERNELS}:add_norm_kernel", types, constants, norm_warps(width), 3, list(tensors), fuses=False)


def rope(dtype: str, head_dim: int, *, is_normed: bool) -> Form:
    rows = ("query", "key", "value", "cos", "sin", "query_weight", "key_weight", "out", "keys", "values")
    tensors = dict.fromkeys(rows, POINTERS[dtype])
    row = 6 * head_dim
    constants = {"QUERY_ROW": row, "KEY_ROW": row, "VALUE_ROW": row, "KV_HEADS": 1, "GROUP": 4, "HEAD_DIM": head_dim}
    constants |= {"HEADS": 4, "HALF": head_dim // 2, "HAS_NORMS": int(is_normed)}
    types = {**tensors, "slots": "*i64", "first": "i32", "eps": "fp32"}
    return Form(f"{KERNELS}:rope_store_kernel", types, constants, 1, 3, list(tensors), fuses=False)


def silu(dtype: str, width: int) -> Form:
    tensors = dict.fromkeys(("gate", "up", "out"), POINTERS[dtype])
    constants = {"GATE_ROW": 2 * width, "UP_ROW": 2 * width, "WIDTH": width, "BLOCK": SILU_BLOCK}
    return Form(f"{KERNELS}:silu_mul_kernel", tensors, constants, 4, 3, list(tensors), fuses=False)


@cache
def compiled_for(card: int) -> dict[Name, Compiled]:
    forms: dict[Name, Form] = {("norm", *size): norm(*size, has_delta=True) for size in NORMS}
    forms |= {("first norm", *size): norm(*size, has_delta=False) for size in NORMS}
    forms |= {("rope", *size): rope(*size, is_normed=False) for size in HEADS}
    forms |= {("normed rope", *size): rope(*size, is_normed=True) for size in HEADS}
    forms |= {("silu", dtype, 14336): silu(dtype, 14336) for dtype in POINTERS}
    return dict(zip(forms, compile_ahead(list(forms.values()), card), strict=True))


@pytest.mark.parametrize("card", CARDS)
def test_all_is_held_in_registers(card: int) -> None:
    assert LARGEST_BYTES == 2 * LARGEST
    compiled = compiled_for(card)
    assert {name: form.stack_bytes for name, form in compiled.items() if form.stack_bytes + form.local_bytes} == {}
    assert {name for name, form in compiled.items() if form.registers * form.num_threads > MAX_REGISTERS} == set()


@pytest.mark.parametrize("card", CARDS)
def test_products_and_sums_are_rounded_each(card: int) -> None:
    """As transformers rounds them: one instruction for both would be more exact, and other bits."""
    assert {
        name for name, form in compiled_for(card).items() if name[0] == "rope" and form.count("fma.rn.f32")
    } == set()


@pytest.mark.parametrize("card", CARDS)
def test_rows_move_16_bytes_at_a_time(card: int) -> None:
    for (kernel, dtype, size), form in compiled_for(card).items():
        if kernel in {"norm", "silu"} and size >= 4096:
            assert form.count("st.global.v4.b32"), (kernel, dtype, size)
            assert not form.count("st.global.b16"), (kernel, dtype, size)
