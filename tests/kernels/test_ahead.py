"""Kernels compiled ahead of time: what is loaded is what this processor runs and was asked for, or what it compiles."""

import subprocess
from pathlib import Path

import pytest

from swaplora_server.kernels.cpu import ahead, build
from swaplora_server.kernels.cpu.ahead import TARGETS, Target

SOURCE = 'extern "C" int lanes() { return LANES + TILES; }'
BEYOND = "__AVX512F__", "__AVX512BF16__", "__AVX512VNNI__", "__AMX_TILE__", "__AMX_BF16__", "__AMX_INT8__"
MEANT = dict(zip(BEYOND, ("avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"), strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    folder = tmp_path_factory.mktemp("made")
    source = folder / "lanes.cpp"
    source.write_text(SOURCE)
    ahead.compile_all("lanes", [source], folder / "ahead")
    return [source], folder / "ahead"


def names(paths: list[Path]) -> list[str]:
    return [path.name.removeprefix("lanes-").rsplit("-", 1)[0] for path in paths]


def has(monkeypatch: pytest.MonkeyPatch, *targets: str) -> None:
    """Let this be a processor with what these targets want."""
    found = frozenset[str]().union(*(target.instructions for target in TARGETS if target.name in targets))
    monkeypatch.setattr(build, "processor_instructions", lambda: found)
    monkeypatch.setattr(build, "_may_use_tiles", lambda: True)


@pytest.mark.parametrize(
    ("processor", "runs"),
    [
        ("v4-amx", ["v4-amx"]),
        ("v4-bf16", ["v4-bf16", "v4-vnni", "v4"]),
        ("v4-vnni", ["v4-vnni", "v4"]),
        ("v4", ["v4"]),
        ("v3", ["v3"]),
        ("none", []),
    ],
)
def test_a_processor_is_given_the_best_that_it_runs(
    made: tuple[list[Path], Path], monkeypatch: pytest.MonkeyPatch, processor: str, runs: list[str]
) -> None:
    has(monkeypatch, processor)
    assert names(ahead.runnable("lanes", *made)) == runs


def test_what_the_environment_asks_for_goes_before(
    made: tuple[list[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, "v4-bf16")
    monkeypatch.setenv("SWAPLORA_KERNEL_LANES", "8")
    assert names(ahead.runnable("lanes", *made)) == ["v3"]
    monkeypatch.setenv("SWAPLORA_KERNEL_PLAIN", "1")
    assert ahead.runnable("lanes", *made) == []


def test_one_is_loaded_and_nothing_compiled_unless_it_is_cut_or_of_other_code(
    made: tuple[list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, folder = made
    reports: list[str] = []
    wanted = build.variant()
    found = ahead.runnable("lanes", sources, folder)
    if not found:
        pytest.skip("this processor runs none of them")
    loaded = build.load("lanes", sources, tmp_path, reports.append, found)
    assert (loaded.lanes(), reports, list(tmp_path.iterdir())) == (wanted.lanes + wanted.has_tiles, [], [])
    for path in found:
        path.write_bytes(path.read_bytes()[:-1])
    build.load("lanes", sources, tmp_path, reports.append, found)
    assert reports == ["compiling lanes"]
    sources[0].write_text(SOURCE + "\n")
    assert not any(path.exists() for path in ahead.runnable("lanes", sources, folder))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_no_instruction_is_used_that_was_not_asked_for(target: Target) -> None:
    """What a compiler may use for a target is in the words that Linux must say before it is loaded."""
    flags = build.flags_for(target.flags, target.variant)
    command = ["g++", *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
    defined = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    macros = {line.split()[1] for line in defined.splitlines()}
    vectors = {name for name in macros if name.startswith(("__AVX", "__AMX", "__BMI", "__FMA", "__F16C"))}
    known = {f"__{word.upper()}__" for word in target.instructions if "_" not in word}
    known |= {"__BMI__"} | {name for name, word in MEANT.items() if word in target.instructions}
    assert vectors - known == set()
    assert vectors >= {name for name, word in MEANT.items() if word in target.instructions}
    assert (target.variant.lanes == 16) == ("__AVX512F__" in vectors)


def test_without_the_folder_nothing_is_looked_for(tmp_path: Path) -> None:
    assert ahead.runnable("lanes", [], tmp_path / "none") == []
    assert not ahead.FOLDER.exists()  # the source's: it is an image that has one
