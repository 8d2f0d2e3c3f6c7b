"""Native code that an image brings, compiled for several kinds of x86-64 at once: `python -m` this, when it is built.

Which of them is loaded is decided where it runs, by the instructions that Linux lists. What is none of them compiles
its own, as without an image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from swaplora_server.kernels.cpu import build
from swaplora_server.kernels.cpu.build import Variant

FOLDER = Path(__file__).parent / "ahead"
_V3 = [
    "avx",
    "avx2",
    "bmi1",
    "bmi2",
    "f16c",
    "fma",
    "abm",
    "movbe",
    "cx16",
    "lahf_lm",
    "popcnt",
    "pni",
    "sse4_1",
    "sse4_2",
    "ssse3",
]
_V4 = [*_V3, *["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]]
_BF16 = ["avx512_vnni", "avx512_bf16"]
_TILES = ["amx_tile", "amx_int8", "amx_bf16"]
_FLAGS = {
    "avx512_vnni": "-mavx512vnni",
    "avx512_bf16": "-mavx512bf16",
    "amx_tile": "-mamx-tile",
    "amx_int8": "-mamx-int8",
    "amx_bf16": "-mamx-bf16",
}


class Target(NamedTuple):
    """A kind of processor: what it has, as Linux says it and as compilers do, and what is compiled for it."""

    name: str
    instructions: frozenset[str]
    flags: tuple[str, ...]
    variant: Variant


def _target(name: str, level: str, common: Sequence[str], more: Sequence[str], variant: Variant) -> Target:
    return Target(name, frozenset([*common, *more]), (f"-march={level}", *(_FLAGS[each] for each in more)), variant)


# the best first
TARGETS = (
    _target("v4-amx", "x86-64-v4", _V4, [*_BF16, *_TILES], Variant(16, has_tiles=True)),
    _target("v4-bf16", "x86-64-v4", _V4, _BF16, Variant(16, has_tiles=False)),
    _target("v4-vnni", "x86-64-v4", _V4, _BF16[:1], Variant(16, has_tiles=False)),
    _target("v4", "x86-64-v4", _V4, [], Variant(16, has_tiles=False)),
    _target("v3", "x86-64-v3", _V3, [], Variant(8, has_tiles=False)),
)


def path_of(name: str, sources: Sequence[Path], target: Target, folder: Path = FOLDER) -> Path:
    """Where it lies, of this very code."""
    made_of = build.fingerprint(sources, build.flags_for(target.flags, target.variant))
    return folder / f"{name}-{target.name}-{made_of}.so"


def runnable(name: str, sources: Sequence[Path], folder: Path = FOLDER) -> list[Path]:
    """Where those would lie that this processor runs, as what is wanted of it, the best first."""
    if not folder.is_dir():
        return []
    has, wanted = build.processor_instructions(), build.variant()
    chosen = (target for target in TARGETS if target.instructions <= has and target.variant == wanted)
    return [path_of(name, sources, target, folder) for target in chosen]


def compile_all(name: str, sources: Sequence[Path], folder: Path = FOLDER) -> None:
    """Raises NoCompilerError."""
    folder.mkdir(exist_ok=True)
    for target in TARGETS:
        flags = build.flags_for(target.flags, target.variant)
        build.compile_to(path_of(name, sources, target, folder), sources, flags)


if __name__ == "__main__":
    compile_all("kernels", build.SOURCES)
