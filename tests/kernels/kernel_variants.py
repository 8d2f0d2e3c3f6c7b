"""The kernels' own tests, or any code, in a process for which they are compiled otherwise: see `build.variant`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_tests(variant: dict[str, str], names: Sequence[str]) -> None:
    paths = [str(Path(__file__).with_name(name)) for name in names]
    run(variant, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *paths)


def run_python(variant: dict[str, str], code: str) -> str:
    return run(variant, "-c", code).splitlines()[-1]


def run(variant: dict[str, str], *arguments: str) -> str:
    environment = {**os.environ, **variant, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout
