"""Triton kernels compiled without a GPU, and what the compiler says of them."""

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from repository import KERNEL_CACHE

AMPERE, HOPPER = 80, 90
CARDS = (AMPERE, HOPPER)


@dataclass(frozen=True)
class Form:
    """A kernel as one launch specialises it."""

    kernel: str  # module:function
    types: Mapping[str, str]  # of every argument that is no constant: *bf16, i32, fp32
    constants: Mapping[str, int]
    num_warps: int
    num_stages: int
    aligned: Sequence[str] = ()  # arguments that are multiples of 16
    max_registers: int | None = None  # of each thread; None: as the compiler likes, which spills to have more programs
    fuses: bool = True  # products and sums into one instruction, where the compiler sees them beside each other


@dataclass(frozen=True)
class Compiled:
    """What a card would run."""

    registers: int  # of each thread
    stack_bytes: int  # of each thread: what the registers do not hold
    local_bytes: int
    shared_bytes: int
    num_threads: int
    ptx: str

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the PTX, by its beginning: `mma.sync`, `wgmma.mma_async`, `cp.async`."""
        return len(re.findall(rf"\b{re.escape(instruction)}\b", self.ptx))


def compile_ahead(forms: Sequence[Form], card: int) -> list[Compiled]:
    """Compile for a card of compute capability `card` / 10. Raises triton's CompilationError.

    What is the same code, by the same compiler, as was compiled before is taken from triton's cache.
    """
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(KERNEL_CACHE / "triton")}
    with patch.dict(os.environ, settings):
        return [_compile(form, card) for form in forms]


def _compile(form: Form, card: int) -> Compiled:
    import triton  # which is for Linux alone
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = form.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = {name: form.types.get(name, "constexpr") for name in kernel.arg_names}
    # in the form that a launch gives it, so that what is launched alike is the same entry of triton's cache
    known: dict[str, list[list[str | int]]] = {name: [["tt.divisibility", 16]] for name in form.aligned}
    known |= {name: [] for name in kernel.arg_names if name not in form.types}
    attributes = {(at,): known[name] for at, name in enumerate(kernel.arg_names) if name in known}
    compiled = triton.compile(
        ASTSource(kernel, signature, dict(form.constants), attributes),
        target=GPUTarget("cuda", card, 32),
        options={
            "num_warps": form.num_warps,
            "num_stages": form.num_stages,
            "maxnreg": form.max_registers,
            "enable_fp_fusion": form.fuses,
        },
    )
    usage = _resources(compiled.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return Compiled(
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        num_threads=form.num_warps * 32,
        ptx=compiled.asm["ptx"],
    )


def _resources(cubin: bytes, cuobjdump: Path) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", done.stdout)}
