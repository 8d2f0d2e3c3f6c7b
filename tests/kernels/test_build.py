"""Compiled code in the cache: whole or made again, and of one width throughout."""

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from repository import KERNEL_CACHE
from swaplora_server.kernels.cpu import abi, build
from swaplora_server.kernels.pick import pick_backend

KERNEL_TESTS = tuple(f"test_{name}.py" for name in ("linear", "linear_bf16", "attention", "lora", "quantised_linear"))
PRODUCTS = ("test_linear_bf16.py", "test_quantised_linear.py")  # those of instructions that not all processors have
SOURCE = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def test_a_library_that_was_cut_or_damaged_is_made_again(source: Path, tmp_path: Path) -> None:
    reports: list[str] = []
    cache = tmp_path / "cache"
    assert build.load("answer", [source], cache, reports.append).answer() == 42
    (library,) = cache.iterdir()
    whole = library.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], whole[:-1], whole[:100] + b"\0\1" + whole[102:], b"no library"):
        library.unlink()  # what this process has loaded stays as it is
        library.write_bytes(broken)
        assert build.load("answer", [source], cache, reports.append).answer() == 42
        assert library.read_bytes() == whole
    assert build.load("answer", [source], cache, reports.append).answer() == 42
    assert reports == ["compiling answer"] * 6


@pytest.mark.parametrize("lanes", [8, 16])
def test_all_that_python_knows_of_a_width_comes_from_the_library(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAPLORA_KERNEL_LANES", str(lanes))
    assert build.variant().lanes == lanes
    library = abi.load_library(KERNEL_CACHE, lambda _message: None)
    assert (library.lanes(), library.fp32_words(1, 1, False)) == (lanes, 2 * lanes)


@pytest.mark.parametrize("structure", abi.STRUCTURES)
def test_a_structure_that_differs_from_the_header_is_refused(
    structure: type[ctypes.Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = abi.load_library(KERNEL_CACHE, lambda _message: None)
    longer = type(structure.__name__, (structure,), {"_fields_": (("more", ctypes.c_int64),)})
    monkeypatch.setattr(abi, "STRUCTURES", (longer,))
    with pytest.raises(RuntimeError, match=structure.__name__):
        abi.check_structures(library)


def test_every_structure_of_the_header_has_its_mirror() -> None:
    declared = set(re.findall(r"^struct (\w+) {", (build.CSRC / "abi.h").read_text(), re.MULTILINE))
    assert declared == {structure.__name__ for structure in abi.STRUCTURES}


def test_the_kernels_are_right_in_the_other_width_too() -> None:
    """Their own tests once more. What is too wide for this processor, the compiler does in parts."""
    run_tests({"SWAPLORA_KERNEL_LANES": str(24 - build.variant().lanes)}, KERNEL_TESTS)


@pytest.mark.parametrize("order", ["tiles", "pairs"])
def test_products_are_right_without_the_processors_instructions_for_them(order: str) -> None:
    run_tests({"SWAPLORA_KERNEL_ORDER": order, "SWAPLORA_KERNEL_PLAIN": "1"}, PRODUCTS)


def test_products_are_right_in_the_order_that_this_processor_does_not_prefer() -> None:
    order = "pairs" if build.variant().has_tiles else "tiles"
    run_tests({"SWAPLORA_KERNEL_ORDER": order}, PRODUCTS)


@pytest.mark.parametrize("order", ["tiles", "pairs"])
def test_plain_code_gives_the_bits_of_the_instruction(order: str) -> None:
    """In either width. Where the processor has no instruction, all four are plain."""
    digests = {
        run_python(
            {"SWAPLORA_KERNEL_ORDER": order, "SWAPLORA_KERNEL_PLAIN": plain, "SWAPLORA_KERNEL_LANES": lanes}, PRODUCT
        )
        for plain in ("", "1")
        for lanes in ("8", "16")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("source", ["linear_int8", "linear_four_bit"])
def test_sums_of_products_of_codes_stay_in_registers(source: str, tmp_path: Path) -> None:
    """Compiled for AVX512 on any processor. Of a tile a little too large, compilers keep sums on the stack."""
    compiled = tmp_path / "compiled.o"
    flags = ("-O3", "-march=icelake-server", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-fPIC")
    variant = build.Variant(lanes=16, has_tiles=False, is_plain=False).flags
    code = build.CSRC / f"{source}.cpp"
    subprocess.run(["g++", *flags, *variant, "-c", "-o", str(compiled), str(code)], check=True)
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(compiled)], check=True, capture_output=True, text=True
    ).stdout
    tiles = re.findall(r"^[0-9a-f]+ <void \(anonymous namespace\)::tile<.*?(?=^$)", listing, re.MULTILINE | re.DOTALL)
    assert len(tiles) >= 4
    for tile in tiles:
        assert re.search(r"vpdpbusd|vfmadd", tile)
        spills = [line for line in tile.splitlines() if re.search(r"zmm.*\(%r[sb]p|\(%r[sb]p.*zmm", line)]
        assert not spills, (tile.splitlines()[0], spills)


PRODUCT = """
import ctypes, hashlib, torch
from repository import KERNEL_CACHE
from swaplora_adapters.weights.memory import HugePages
from swaplora_server.kernels.cpu import abi, linear, quantised_linear
from swaplora_server.kernels.quantised_codes import Codes
library = abi.load_library(KERNEL_CACHE, lambda _message: None)
digest, generator = hashlib.sha256(), torch.Generator().manual_seed(1)
for scale in (1.0, 1e-18, 1e-30, 1e25):
    plain = torch.nn.Linear(301, 100)
    for parameter in plain.parameters():
        parameter.data.normal_(generator=generator).mul_(scale)
    packed = linear.pack(library, torch.bfloat16, plain, HugePages())
    for rows in (1, 9, 40):
        x = torch.randn(rows, 301, generator=generator).mul_(scale)
        x[:, ::50] *= 1e-20
        digest.update(packed(x).numpy().tobytes())
codes = torch.randint(-128, 128, (100, 320), generator=generator)
for quantised, table in ((codes.to(torch.int8), None), (codes.to(torch.uint8) & 15, torch.linspace(-1, 1, 16))):
    scales = torch.rand(100, 1 if table is None else 5, generator=generator)
    packed = quantised_linear.QuantisedLinear(library, HugePages(), Codes(quantised, scales, table), None)
    for rows in (1, 4, 9, 40):
        digest.update(packed(torch.randn(rows, 320, generator=generator)).numpy().tobytes())
print(digest.hexdigest())
"""


def run_tests(variant: dict[str, str], names: Sequence[str]) -> None:
    paths = [str(Path(__file__).with_name(name)) for name in names]
    run(variant, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *paths)


def run_python(variant: dict[str, str], code: str) -> str:
    return run(variant, "-c", code).splitlines()[-1]


def run(variant: dict[str, str], *arguments: str) -> str:
    environment = {**os.environ, **variant, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_without_a_compiler_the_start_says_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load", _no_compiler)
    with capture_logs() as lines:
        backend = pick_backend(torch.device("cpu"), torch.float32, KERNEL_CACHE, lambda _message: None)
    assert any("a row's last bits depend on those beside it" in line["event"] for line in lines)
    assert backend.description == "torch's operations"
    with pytest.raises(build.NoCompilerError):
        pick_backend(torch.device("cpu"), torch.bfloat16, KERNEL_CACHE, lambda _message: None)


def _no_compiler(*_: object) -> None:
    raise build.NoCompilerError("there is no C++ compiler")
