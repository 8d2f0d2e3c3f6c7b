"""Decisions, and what only reads requests, are there without torch."""

import subprocess
import sys

import pytest

MODULES = (
    *(
        f"engine.{name}"
        for name in ("scheduling.scheduler", "request", "kv_cache", "prefix_cache", "block_keys", "row_faults")
    ),
    "engine.snapshot",
    "http.pooling.wire",
    "http.wire",
    "http.refusals",
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_no_torch(module: str) -> None:
    script = f"import sys, swaplora_server.{module}; print(*({{'torch', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
