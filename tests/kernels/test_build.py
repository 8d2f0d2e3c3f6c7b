"""Compiled code in the cache: whole or made again, and of one width throughout."""

import ctypes
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from structlog.testing import capture_logs

from repository import KERNEL_CACHE
from swaplora_server.kernels.cpu import abi, build
from swaplora_server.kernels.pick import pick_backend

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
    (library,) = (path for path in cache.iterdir() if path.suffix != ".lock")
    whole = library.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], whole[:-1], whole[:100] + b"\0\1" + whole[102:], b"no library"):
        library.unlink()  # what this process has loaded stays as it is
        library.write_bytes(broken)
        assert build.load("answer", [source], cache, reports.append).answer() == 42
        assert library.read_bytes() == whole
    assert build.load("answer", [source], cache, reports.append).answer() == 42
    assert reports == ["compiling answer"] * 6


def test_who_comes_while_it_is_compiled_waits_for_that(source: Path, tmp_path: Path) -> None:
    reports: list[str] = []
    both = Barrier(2)

    def answer(_number: int) -> int:
        both.wait()
        found: int = build.load("answer", [source], tmp_path / "cache", reports.append).answer()
        return found

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(answer, range(2))) == [42, 42]
    assert reports == ["compiling answer"]


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
