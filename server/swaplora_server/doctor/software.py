"""Versions, a compiler, a GPU, the base and the port: what a start needs beside the machine."""

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from swaplora_server.config import EMBEDDED_IDS, Settings
from swaplora_server.doctor.finding import Effect, Finding

PACKAGES = ("swaplora", "torch", "transformers", "peft", "tokenizers", "llguidance", "fastapi", "uvicorn")
COMPILERS = ("g++", "clang++")
_GPU_SECONDS = 5
_GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


def software_findings(settings: Settings) -> Iterator[Finding]:
    yield Finding("versions", ", ".join([f"python {platform.python_version()}", *map(_package, PACKAGES)]))
    if settings.quantization is not None and _version("bitsandbytes") is None:
        remark = "--quantization needs it: pip install 'swaplora[quantized]'"
        yield Finding("bitsandbytes", "not installed", remark, Effect.FAILS)
    if settings.tracing and _version("opentelemetry-sdk") is None:
        remark = "--tracing needs it: pip install 'swaplora[otel]'"
        yield Finding("opentelemetry-sdk", "not installed", remark, Effect.FAILS)
    gpus = [] if settings.device == "cpu" else find_gpus()
    if settings.device != "cpu":
        yield _gpu(settings, gpus)
    if not gpus:
        yield _compiler()
    yield _base(settings)
    yield _port(settings)


def find_gpus() -> list[str]:
    """What NVIDIA's driver lists: name, memory and the driver's version of each."""
    try:
        done = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=_GPU_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _gpu(settings: Settings, gpus: list[str]) -> Finding:
    if not gpus:
        remark = "--device cuda needs one, and NVIDIA's driver lists none" if settings.device == "cuda" else ""
        return Finding.of("GPU", "none", remark, effect=Effect.FAILS)
    for_cpu = "+cpu" in (_version("torch") or "")
    remark = "torch is built for CPUs alone: install the build for CUDA" if for_cpu else ""
    effect = Effect.FAILS if settings.device == "cuda" else Effect.SLOW
    return Finding.of("GPU", "; ".join(gpus), remark, effect=effect)


def _compiler() -> Finding:
    names = [name for name in (os.environ.get("CXX"), *COMPILERS) if name]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        return Finding("compiler", "none", "native kernels cannot be compiled: install g++, or set CXX", Effect.SLOW)
    return Finding("compiler", found)


def _base(settings: Settings) -> Finding:
    if settings.base in EMBEDDED_IDS:
        return Finding("base", settings.base)
    folder = Path(settings.base)
    if not folder.is_dir():
        is_path = settings.base.startswith(("/", ".", "~")) or settings.base.count("/") > 1
        remark = "there is no such folder, and no hub id looks like this" if is_path else ""
        return Finding.of("base", settings.base, remark, effect=Effect.FAILS)
    remark = "" if (folder / "config.json").is_file() else "the folder has no config.json, so it is no model"
    return Finding.of("base", settings.base, remark, effect=Effect.FAILS)


def _port(settings: Settings) -> Finding:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = f"{settings.host}:{settings.port}"
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        remark = f"cannot be listened on ({error.strerror}): stop what does, or choose another --port"
        return Finding("address", found, remark, Effect.FAILS)
    return Finding("address", found)


def _package(name: str) -> str:
    return f"{name} {_version(name) or 'not installed'}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
