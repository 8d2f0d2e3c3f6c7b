"""Every form in which the GPU's LoRA kernels can be launched compiles, for Ampere and for Hopper, and fits the card."""

import re
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from ahead_of_time import CARDS, HOPPER, Compiled, Form, compile_ahead
from repository import KERNEL_CACHE
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.kernels.cuda.adapter_tables import AdapterTables
from swaplora_server.kernels.cuda.lora_shapes import GROUP, Launch, expand_launch, shrink_launch
from swaplora_server.kernels.step import Segment, Segments

if sys.platform == "linux":
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from swaplora_server.kernels.cuda.lora import CudaLora

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
    shape = launch.shape
    return Form(
        f"{KERNELS}:{kernel}",
        PLAN | types,
        launch.constants,
        shape.num_warps,
        shape.num_stages,
        max_registers=shape.max_registers,
    )


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


@cache
def compiled_for(card: int) -> dict[tuple[str, str, bool], Compiled]:
    return dict(zip(FORMS, compile_ahead(list(FORMS.values()), card), strict=True))


@pytest.fixture(params=CARDS)
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, str, bool], Compiled]:
    return compiled_for(request.param)


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
        if dtype != "float32":
            assert compiled["shrink", dtype, True].count("cp.async.ca.shared.global") == 0
            assert compiled["shrink", dtype, True].count("ld.global.b16") == 0
            assert compiled["expand", dtype, True].count("ld.global.b16") == 0


class _Driver:
    """Of a card that is not there: enough for kernels to be compiled at their launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", HOPPER, 32)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The PTX of whatever is launched meanwhile, and not run."""
    found: set[str] = set()
    run = JITFunction.run

    def compile_alone(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.add(code_of(run(kernel, *arguments, grid=grid, warmup=True, **options).asm["ptx"]))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(KERNEL_CACHE / "triton"))
    monkeypatch.setattr(JITFunction, "run", compile_alone)
    monkeypatch.setattr(driver, "_active", _Driver())
    return found


def code_of(ptx: str) -> str:
    """Without what tells where it comes from."""
    code, _, _ = ptx.partition(".debug_")
    return "\n".join(line for line in code.splitlines() if not re.match(r"\s*(//|\.loc|\.file)", line))


def test_launches_compile_what_was_tried_and_nothing_else(launched: set[str]) -> None:
    """Whatever the numbers are. Else one might be compiled in the midst of a step, and it would be one unseen."""
    cpu = torch.device("cpu")
    for dtype, width, num_rows in product(
        (torch.float32, torch.float16, torch.bfloat16), (1, 7, 16, 48, 4096), (1, 17)
    ):
        module = ModuleWeights(torch.zeros(8, width, dtype=dtype), torch.zeros(8, width, dtype=dtype).t())
        weights = AdapterWeights("sha256:0", {"q": module})
        prepared = replace(weights, tables=AdapterTables(weights, ["q"], dtype, cpu))
        lora = CudaLora.of(Segments([Segment(prepared, 1.0, 0, num_rows)]), dtype, cpu)
        x, y, other = (torch.zeros(num_rows, width, dtype=dtype) for _ in range(3))
        lora.add(x, [(y, 0)])
        lora.add(x, [(y, 0), (other, 0)])
    assert launched == {code_of(form.ptx) for form in compiled_for(HOPPER).values()}
    assert len(launched) == len(FORMS)
