"""The plan of the house: no circles, and what needs no torch.

Which room may import from which stands in pyproject.toml: `lint-imports` reads it, in `make check`.
"""

import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from repository import ROOT

# what an adapter and a name are, and what talks to a server
NO_TORCH = (
    "swaplora_adapters.config.parse",
    "swaplora_adapters.config.spec",
    "swaplora_adapters.errors",
    "swaplora_adapters.registry.index",
    "swaplora_adapters.sources.source",
    "swaplora_server.bench.load",
    "swaplora_server.client",
)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Wherever in a file they do, and for type checkers alone too."""
    grimp = pytest.importorskip("grimp", reason="it comes with import-linter")
    graph = grimp.build_graph("swaplora_server", "swaplora_adapters", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("module", NO_TORCH)
def test_what_decides_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "server").returncode == 0
