"""Every form in which the GPU's LoRA kernels can be launched compiles, for Ampere and for Hopper, and fits the card."""

import importlib
import sys
from itertools import product

import pytest

from ahead_of_time import CARDS, Compiled, Form, compile_ahead
from swaplora_server.kernels.cuda.lora_shapes import GROUP, Launch, expand_launch, shrink_launch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux alone")

KERNELS = "swaplora_server.kernels.cuda.lora_kernels"
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
PLAN = {"plan": "*i64", "first_entry_word": "i32", "h": "*fp32", "h_elements": "i64", "num_modules": "i32"}
MAX_REGISTERS = 32 << 10  # of a program: two at once on each processor
PRODUCT = "mma.sync.aligned.m16n8k16.row.col.f32"
COPY = "cp.async.cg.shared.global"  # of 16 bytes, past the first cache


def each(*names: str) -> dict[str, str]:
    """Numbers of each module of a group."""
    return {f"{name}{module}": "i32" for name in names for module in range(GROUP)}


def form(kernel: str, types: dict[str, str], launch: Launch) -> Form:
    return Form(f"{KERNELS}:{kernel}", PLAN | types, launch.constants, launch.shape.num_warps, launch.shape.num_stages)


def shrink(dtype: str, *, is_aligned: bool) -> Form:
    types = {"x": POINTERS[dtype], "x_stride": "i32", "in_features": "i32", **each("number")}
    return form("lora_shrink", types, shrink_launch(dtype, is_aligned=is_aligned))


def expand(dtype: str, *, is_aligned: bool) -> Form:
    outputs = {f"y{module}": POINTERS[dtype] for module in range(GROUP)}
    types = {**outputs, "num_planes": "i32", **each("out_features", "y_stride", "number")}
    return form("lora_expand", types, expand_launch(dtype, is_aligned=is_aligned))


FORMS = {
    (kernel.__name__, dtype, is_aligned): kernel(dtype, is_aligned=is_aligned)
    for kernel, dtype, is_aligned in product((shrink, expand), POINTERS, (True, False))
}


@pytest.fixture(scope="module", params=CARDS)
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, str, bool], Compiled]:
    return dict(zip(FORMS, compile_ahead(list(FORMS.values()), request.param), strict=True))


def test_all_is_held_in_registers(compiled: dict[tuple[str, str, bool], Compiled]) -> None:
    spilt = {name: form.stack_bytes + form.local_bytes for name, form in compiled.items()}
    assert {name: num_bytes for name, num_bytes in spilt.items() if num_bytes} == {}
    assert {name for name, form in compiled.items() if form.registers * form.num_threads > MAX_REGISTERS} == set()


def test_half_precision_is_multiplied_by_tensor_cores(compiled: dict[tuple[str, str, bool], Compiled]) -> None:
    kinds = {"float32": None, "float16": f"{PRODUCT}.f16.f16.f32", "bfloat16": f"{PRODUCT}.bf16.bf16.f32"}
    for (kernel, dtype, is_aligned), form in compiled.items():
        kind = kinds[dtype]
        assert form.count("mma.sync") == (form.count(kind) if kind else 0), (kernel, dtype, is_aligned)
        assert bool(form.count("mma.sync")) == bool(kind), (kernel, dtype, is_aligned)


def test_aligned_rows_and_factors_move_16_bytes_at_a_time(compiled: dict[tuple[str, str, bool], Compiled]) -> None:
    """Copied ahead of the products that read them, where shrinking; and one store of what was expanded."""
    for dtype in POINTERS:
        assert compiled["shrink", dtype, True].count(COPY) > 0
        assert compiled["shrink", dtype, False].count(COPY) == 0
        assert compiled["expand", dtype, True].count("ld.global.v4.b32") > 0
        assert compiled["expand", dtype, True].count("st.global.v4.b32") > 0
        assert compiled["expand", dtype, False].count("st.global.v4.b32") == 0


@pytest.mark.parametrize("kernel", ["lora_shrink", "lora_expand"])
def test_no_value_of_an_argument_makes_another_form(kernel: str) -> None:
    """Else a launch might compile one that nobody has tried, in the midst of a step."""
    kernels = importlib.import_module(KERNELS)
    constants = {"RANKS", "BLOCK", "IS_ALIGNED"}
    specialised = {param.name for param in getattr(kernels, kernel).params if not param.do_not_specialize}
    assert specialised == constants
    assert set(shrink_launch("float32", is_aligned=True).constants) == constants
