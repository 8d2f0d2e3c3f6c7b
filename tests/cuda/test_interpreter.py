"""The kernels under Triton's interpreter, on a CPU: the tests of all interpreted_*.py, in a process of their own.

Triton reads whether it interprets when a kernel is defined, its own library among them, so that no process does both.
float32 and float16 alone: the interpreter multiplies bfloat16 wrongly.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux alone")


def test_kernels_are_right_under_the_interpreter() -> None:
    paths = sorted(map(str, Path(__file__).parent.glob("interpreted_*.py")))
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    plugins = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "patched_once")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", *plugins, *paths],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
