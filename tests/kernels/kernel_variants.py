"""The kernels' own tests, in a process for which they are compiled otherwise, one variant after the other."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

Variant = dict[str, str]  # what the environment asks for: see `build.variant`
# tests load the kernels where they are imported, which is done once for each variant; torch is imported once for all
_RUN = """
import json, os, pytest, sys
paths = sys.argv[2:]
for variant in json.loads(sys.argv[1]):
    os.environ.update(variant)
    for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", None) in paths]:
        del sys.modules[name]
    if pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *paths]) != pytest.ExitCode.OK:
        sys.exit(f"in {variant}")
"""


def run_tests(variants: Sequence[Variant], names: Sequence[str]) -> None:
    """Each of `variants` sets what the others set."""
    assert len({frozenset(variant) for variant in variants}) == 1
    paths = [str(Path(__file__).with_name(name)) for name in names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _RUN, json.dumps(variants), *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count(" passed") == len(variants)
