"""The GPU's attention in every shape of its tables compiles, for Ampere and for Hopper, and fits the card."""

import re
import sys
from functools import cache
from itertools import product

import pytest

from ahead_of_time import CARDS, HOPPER, Compiled, Form, compile_ahead
from swaplora_server.kernels.cuda.attention_shapes import AHEAD, padded, shape_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux alone")

KERNELS = "swaplora_server.kernels.cuda.attention_kernels"
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
SIZES = [size for size in product(POINTERS, (16, 32, 64, 128, 256)) if size != ("float32", 256)]  # of the tables
PLACES = {"blocks": "*i64", "query_row": "i64", "query_head": "i64"}
LAYER = {"window": "i32", "unit": "fp32", "squash": "fp32", "softcap": "fp32"}
SUMS = {"sums": "*fp32", "largest": "*fp32", "totals": "*fp32"}
MAX_REGISTERS = 32 << 10  # of a program: two at once on each processor


Name = tuple[str, str, int]


def attending(kernel: str, dtype: str, size: int, *, has_softcap: bool) -> Form:
    """With all else that a layer can ask for."""
    shape, pointer = shape_of(dtype, size, size), POINTERS[dtype]
    tensors = {"query": pointer, "keys": pointer, "values": pointer}
    own = {"out": pointer, "sinks": "*fp32", "tiles": "*i64"} if kernel == "prefill" else {**SUMS, "counts": "*i64"}
    own |= {} if kernel == "prefill" else {"items": "*i64"}
    constants = {"KV_HEADS": 2, "GROUP": 4, "HEAD_DIM": size, "VALUE_DIM": size, "BLOCK_SIZE": 16}
    constants |= {"QUERIES": shape.queries, "KEYS": shape.keys, "DIMS": padded(size), "VALUES": shape.values}
    constants |= {"HAS_SOFTCAP": int(has_softcap)} | ({"HAS_SINKS": 1} if kernel == "prefill" else {})
    aligned = [name for name in ("query", "keys", "values", "out", *SUMS) if name in tensors | own]
    types = {**tensors, **own, **PLACES, **LAYER}
    return Form(f"{KERNELS}:attention_{kernel}", types, constants, shape.num_warps, shape.num_stages, aligned)


def folding(dtype: str, size: int) -> Form:
    types = {**SUMS, "out": POINTERS[dtype], "sinks": "*fp32", "decodes": "*i64", "window": "i32", "unit": "fp32"}
    constants = {"HAS_SINKS": 1, "HEADS": 8, "VALUE_DIM": size, "DIMS": padded(size), "AHEAD": AHEAD}
    return Form(f"{KERNELS}:attention_fold", types, constants, 1, 3)


def writing(dtype: str, size: int) -> Form:
    types = dict.fromkeys(("key", "value", "keys", "values"), POINTERS[dtype]) | {"slots": "*i64"}
    types |= dict.fromkeys(("key_row", "key_head", "value_row", "value_head"), "i64")
    constants = {"KV_HEADS": 2, "HEAD_DIM": size, "VALUE_DIM": size, "DIMS": padded(size)}
    return Form(f"{KERNELS}:attention_write", types, constants, 1, 3)


FORMS: dict[Name, Form] = {
    (f"{softcap}{kernel}", *size): attending(kernel, *size, has_softcap=bool(softcap))
    for kernel, softcap, size in product(("prefill", "decode"), ("", "capped "), SIZES)
}
FORMS |= {("fold", *size): folding(*size) for size in SIZES}
FORMS |= {("write", *size): writing(*size) for size in SIZES}


@cache
def compiled_for(card: int) -> dict[Name, Compiled]:
    return dict(zip(FORMS, compile_ahead(list(FORMS.values()), card), strict=True))


@pytest.mark.parametrize("card", CARDS)
def test_all_is_held_in_registers(card: int) -> None:
    compiled = compiled_for(card)
    assert {name: form.stack_bytes for name, form in compiled.items() if form.stack_bytes + form.local_bytes} == {}
    assert {name for name, form in compiled.items() if form.registers * form.num_threads > MAX_REGISTERS} == set()


@pytest.mark.parametrize("card", CARDS)
def test_tensor_cores_multiply_and_keys_are_copied_ahead(card: int) -> None:
    for (kernel, dtype, size), form in compiled_for(card).items():
        if kernel in {"prefill", "decode"}:
            is_wide = card == HOPPER and dtype != "float32"
            assert len(re.findall(r"wgmma\.mma_async" if is_wide else r"mma\.sync", form.ptx)) > 0, (
                kernel,
                dtype,
                size,
            )
            assert dtype == "float32" or form.count("cp.async.cg.shared.global") > 0, (kernel, dtype, size)


@pytest.mark.parametrize("card", CARDS)
def test_prompts_and_decoding_rows_are_multiplied_by_the_same_instructions(card: int) -> None:
    """In the same number and order: a row's bits are the same in both."""
    compiled = compiled_for(card)
    for size in SIZES:
        prefill, decode = (
            re.findall(
                r"(?:wgmma\.mma_async|mma)\.sync\.aligned[\w.:]*|shfl\.sync\.\w+|ex2\.\w+", compiled[kernel, *size].ptx
            )
            for kernel in ("prefill", "decode")
        )
        products = [[found for found in each if "mma" in found] for each in (prefill, decode)]
        assert products[0] == products[1]
        assert products[0]
