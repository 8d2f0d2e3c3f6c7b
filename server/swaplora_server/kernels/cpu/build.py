"""Native code, compiled on first use into a cache folder and loaded from there ever after.

Where code was compiled ahead of time (an image's, see `ahead`) and this processor runs it, nothing is compiled.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

CSRC = Path(__file__).parent / "csrc"
SOURCES = sorted(CSRC.rglob("*.cpp"))
_FLAGS = ("-ffp-contract=off", "-std=c++17", "-fopenmp", "-fPIC")
_LANES, _ORDER, _PLAIN = "SWAPLORA_KERNEL_LANES", "SWAPLORA_KERNEL_ORDER", "SWAPLORA_KERNEL_PLAIN"
_REQUEST_TILES = (158, 0x1023, 18)  # arch_prctl, ARCH_REQ_XCOMP_PERM, the registers of tiles
_DIGEST_BYTES = hashlib.sha256().digest_size


class NoCompilerError(RuntimeError):
    """Native code cannot be had on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What the kernels are compiled as, beyond what the processor has."""

    lanes: int  # floats that they work on at a time, 8 or 16
    has_tiles: bool  # whether bfloat16 products are summed as AMX does (csrc/products.h), or as AVX512 does
    is_plain: bool = False  # whether plain C++ stands for the instructions that multiply 16 and 8 bits

    @property
    def flags(self) -> tuple[str, ...]:
        plain = ("-DPLAIN",) if self.is_plain else ()
        return f"-DLANES={self.lanes}", f"-DTILES={int(self.has_tiles)}", *plain


def load(
    name: str, sources: Sequence[Path], cache_dir: Path, report: Callable[[str], None], ahead: Sequence[Path] = ()
) -> ctypes.CDLL:
    """The shared library `name`, made of C++ files, or the first whole one of those made `ahead`. NoCompilerError.

    OpenMP's runtime is the one that torch has loaded already, so that its threads are torch's own.
    """
    if found := next(filter(_is_whole, ahead), None):
        return ctypes.CDLL(str(found))
    library = cache_dir / f"{name}-{_fingerprint(sources)}.so"
    if not _is_whole(library):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock")):  # whoever comes meanwhile, of any process, waits for what is made
            if not _is_whole(library):
                report(f"compiling {name}")
                compile_to(library, sources, _flags())
    return ctypes.CDLL(str(library))


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise NoCompilerError("there is no C++ compiler (g++ or clang++)")


def compile_to(library: Path, sources: Sequence[Path], flags: Sequence[str]) -> None:
    """Make it whole, or raise NoCompilerError."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder) / library.name
        compiler = _compiler()
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(partial(_compile_one, compiler, flags, Path(folder)), sources))
            _run([compiler, *flags, "-shared", "-o", str(unfinished), *map(str, objects)])
            _seal(unfinished)
            os.replace(unfinished, library)
        except (subprocess.SubprocessError, OSError) as error:
            detail = getattr(error, "stderr", None) or str(error)
            raise NoCompilerError(f"{library.stem} does not compile: {detail.strip().splitlines()[0]}") from error


def _compile_one(compiler: str, flags: Sequence[str], folder: Path, source: Path) -> Path:
    compiled = folder / f"{source.stem}.o"
    _run([compiler, *flags, f"-I{CSRC}", "-c", "-o", str(compiled), str(source)])
    return compiled


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def _seal(library: Path) -> None:
    """Append the digest of what is there, which no loader reads."""
    digest = hashlib.sha256(library.read_bytes()).digest()
    with library.open("ab") as file:
        file.write(digest)


def _is_whole(library: Path) -> bool:
    """Whether it is there as it was sealed: one that was cut would end the process that loads it."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def variant() -> Variant:
    """The fastest that this processor runs. The environment may ask for another: any processor runs all."""
    instructions = processor_instructions()
    lanes = os.environ.get(_LANES, "16" if "avx512f" in instructions else "8")
    may_use_tiles = "amx_bf16" in instructions and _may_use_tiles()  # asked for whatever the environment says
    order = os.environ.get(_ORDER) or ("tiles" if may_use_tiles else "pairs")
    return Variant(int(lanes), order == "tiles", bool(os.environ.get(_PLAIN)))


def _may_use_tiles() -> bool:
    """Ask Linux for AMX's registers, which it gives to processes that ask."""
    return bool(ctypes.CDLL(None).syscall(*_REQUEST_TILES) == 0)


def flags_for(processor: Sequence[str], wanted: Variant) -> tuple[str, ...]:
    """A compiler's, for what has the instructions that `processor` names."""
    return ("-O3", *processor, *_FLAGS, *wanted.flags)


def _flags() -> tuple[str, ...]:
    return flags_for(["-march=native"], variant())


def _fingerprint(sources: Sequence[Path]) -> str:
    return fingerprint(sources, _flags(), _processor())


def fingerprint(sources: Sequence[Path], flags: Sequence[str], processor: str = "") -> str:
    """Changes with the code, the headers it may include, the flags, and the processor that it is compiled for."""
    code = [path.read_bytes() for path in (*sources, *sorted(CSRC.rglob("*.h")))]
    parts = [*code, " ".join(flags).encode(), processor.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def processor_instructions() -> frozenset[str]:
    """The instruction sets that Linux lists; none elsewhere."""
    return frozenset(_cpuinfo("flags").split())


def is_amd() -> bool:
    return "AuthenticAMD" in _cpuinfo("vendor_id")


def _processor() -> str:
    """The architecture and, on Linux, the instruction sets that the kernel lists."""
    return platform.machine() + _cpuinfo("flags")


def _cpuinfo(name: str) -> str:
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(name))
    except (OSError, StopIteration):
        return ""
