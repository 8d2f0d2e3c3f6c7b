"""What is compiled for tests, once; and the kernels' own tests for other variants, one after the other in a process."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from repository import KERNEL_CACHE
from swaplora_server.kernels.cpu import build

Variant = dict[str, str]  # what the environment asks for: see `build.variant`
# tests load the kernels where they are imported, which is done once for each variant; torch is imported once for all
_RUN = """
import json, os, pytest, sys
for variant, paths in json.loads(sys.argv[1]):
    os.environ.update(variant)
    for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", None) in paths]:
        del sys.modules[name]
    if pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *paths]) != pytest.ExitCode.OK:
        sys.exit(f"in {variant}")
"""
_compile_one = build._compile_one  # noqa: SLF001


def compile_once(compiler: str, flags: Sequence[str], folder: Path, source: Path) -> Path:
    """For `build._compile_one`: most files are the same in several variants once the preprocessor has run."""
    if not source.is_relative_to(build.CSRC):
        return _compile_one(compiler, flags, folder, source)
    command = [compiler, *flags, f"-I{build.CSRC}", "-E", str(source)]
    code = subprocess.run(command, check=True, capture_output=True).stdout
    others = [flag for flag in flags if not flag.startswith("-D")]
    key = json.dumps([compiler, *others, sorted(build.processor_instructions())]).encode() + code
    kept = KERNEL_CACHE / f"{hashlib.sha256(key).hexdigest()}.o"
    if not kept.exists():
        KERNEL_CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KERNEL_CACHE) as beside:
            os.replace(_compile_one(compiler, flags, Path(beside), source), kept)
    return kept


def run_tests(variants: Sequence[tuple[Variant, Sequence[str]]]) -> None:
    """The tests in files of these names, in each variant. Each of `variants` sets what the others set."""
    assert len({frozenset(variant) for variant, _ in variants}) == 1
    paths = [(variant, [str(Path(__file__).with_name(name)) for name in names]) for variant, names in variants]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _RUN, json.dumps(paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count(" passed") == len(variants)
