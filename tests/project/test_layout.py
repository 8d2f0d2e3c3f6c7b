"""The layout of the repository: no circles of imports, what needs no torch, and how many files a folder holds.

Which room may import from which stands in pyproject.toml: `lint-imports` reads it, in `make check`.
"""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import PurePosixPath

import grimp  # comes with import-linter
import pytest

from repository import ROOT

MAX_FILES = 15
# what an adapter and a name are, and what talks to a server
NO_TORCH = (
    "swaplora_adapters.config.parse",
    "swaplora_adapters.config.spec",
    "swaplora_adapters.errors",
    "swaplora_adapters.registry.index",
    "swaplora_adapters.sources.source",
    "swaplora_adapters.train.data",
    "swaplora_adapters.train.recipe",
    "swaplora_server.bench.load",
    "swaplora_server.client",
    "swaplora_server.doctor.machine",
)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Wherever in a file they do, and for type checkers alone too."""
    graph = grimp.build_graph("swaplora_server", "swaplora_adapters", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("module", NO_TORCH)
def test_what_decides_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "server").returncode == 0


def test_a_folder_is_read_at_a_glance() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("only a checkout knows which files are the repository's")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    folders = Counter(str(PurePosixPath(path).parent) for path in listed.split("\0") if path)
    assert {folder: count for folder, count in folders.items() if count > MAX_FILES} == {}


def test_each_room_says_what_it_holds() -> None:
    rooms = [file for package in ("server", "adapters") for file in (ROOT / package).rglob("__init__.py")]
    assert [str(file.relative_to(ROOT)) for file in rooms if not ast.get_docstring(ast.parse(file.read_text()))] == []
