"""Native code, compiled on first use into a cache folder and loaded from there ever after."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

CSRC = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_LANES = "SWAPLORA_KERNEL_LANES"  # for tests, which run either width on any processor
_DIGEST_BYTES = hashlib.sha256().digest_size


class NoCompilerError(RuntimeError):
    """Native code cannot be had on this machine; the message says why."""


def load(source: Path, cache_dir: Path, report: Callable[[str], None]) -> ctypes.CDLL:
    """The shared library made of one C++ file. Raises NoCompilerError.

    OpenMP's runtime is the one that torch has loaded already, so that its threads are torch's own.
    """
    library = cache_dir / f"{source.stem}-{_fingerprint(source)}.so"
    if not _is_whole(library):
        report(f"compiling {source.name}")
        _compile(source, library)
    return ctypes.CDLL(str(library))


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise NoCompilerError("there is no C++ compiler (g++ or clang++)")


def _compile(source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(descriptor)
    try:
        command = [_compiler(), *_flags(), f"-I{CSRC}", "-o", unfinished, str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        _seal(Path(unfinished))
        os.replace(unfinished, library)
    except (subprocess.SubprocessError, OSError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise NoCompilerError(f"{source.name} does not compile: {detail.strip().splitlines()[0]}") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)


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


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, f"-DLANES={lanes()}")


def lanes() -> int:
    """How many floats the kernels work on at a time."""
    return int(os.environ.get(_LANES, 16 if "avx512f" in _processor().split() else 8))


def _fingerprint(source: Path) -> str:
    """Changes with the code, the headers it may include, the flags, and the processor that it is compiled for."""
    headers = sorted({*CSRC.glob("*.h"), *source.parent.glob("*.h")})
    code = [path.read_bytes() for path in (source, *headers)]
    parts = [*code, " ".join(_flags()).encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """The architecture and, on Linux, the instruction sets that the kernel lists."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = ""
    return platform.machine() + flags
