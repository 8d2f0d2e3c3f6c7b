"""The wheel holds every file of both packages, the C++ among them. Hatch leaves out what git ignores, and only that."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

from repository import ROOT

PACKAGES = ["server/swaplora_server", "adapters/swaplora_adapters"]


def is_ignored(path: Path) -> bool:
    """As .gitignore has it, whose patterns are names: of folders, with a slash behind, or of files and folders."""
    *folders, file = path.relative_to(ROOT).parts
    patterns = (ROOT / ".gitignore").read_text().split()
    of_folders = [pattern.removesuffix("/") for pattern in patterns]
    of_files = [pattern for pattern in patterns if not pattern.endswith("/")]
    return any(fnmatch(name, pattern) for name in folders for pattern in of_folders) or any(
        fnmatch(file, pattern) for pattern in of_files
    )


def test_the_wheel_leaves_nothing_of_the_packages_out() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": PACKAGES}
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    left_out = {path for path in files if is_ignored(path)}
    assert {path for path in left_out if "__pycache__" not in path.parts} == set()
    assert {path.suffix for path in files} >= {".cpp", ".h", ".html", ".css", ".js"}
