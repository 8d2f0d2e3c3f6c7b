"""Compiled code in the cache: whole or made again, and of one width throughout."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from repository import KERNEL_CACHE
from swaplora_server.kernels.cpu import abi, build
from swaplora_server.kernels.pick import pick_backend

KERNEL_TESTS = ("test_linear.py", "test_attention.py", "test_lora.py", "test_quantised_linear.py")
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
    assert build.lanes() == lanes
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
    environment = {**os.environ, "SWAPLORA_KERNEL_LANES": str(24 - build.lanes()), "OMP_WAIT_POLICY": "passive"}
    names = [str(Path(__file__).with_name(name)) for name in KERNEL_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("dtype", "has_compiler"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)]
)
def test_the_start_says_where_a_rows_last_bits_depend_on_the_rest_of_its_batch(
    dtype: torch.dtype, has_compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_compiler:
        monkeypatch.setattr(build, "load", _no_compiler)
    cache = KERNEL_CACHE
    with capture_logs() as lines:
        pick_backend(torch.device("cpu"), dtype, cache, lambda _message: None)
    is_said = any("a row's last bits depend on those beside it" in line["event"] for line in lines)
    assert is_said == (dtype != torch.float32 or not has_compiler)


def _no_compiler(*_: object) -> None:
    raise build.NoCompilerError("there is no C++ compiler")
