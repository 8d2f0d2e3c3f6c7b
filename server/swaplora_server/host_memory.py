"""How much of the host's memory this process may have, as Linux tells it."""

import re
from pathlib import Path


def total_bytes(root: Path = Path("/")) -> int:
    """Of the machine; 0 where nothing tells. `root` is where `proc` and `sys` are."""
    return _field(root / "proc/meminfo", "MemTotal")


def allowed_bytes(root: Path = Path("/")) -> int:
    """The same, or less where a control group limits it."""
    total, limit = total_bytes(root), read_text(root / "sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def room_bytes(root: Path = Path("/")) -> int | None:
    """What is left beside what this process holds and cannot read again from files; None where nothing tells."""
    allowed = allowed_bytes(root)
    return max(0, allowed - _field(root / "proc/self/status", "RssAnon")) if allowed else None


def read_text(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _field(path: Path, name: str) -> int:
    """In bytes, of a file that has kB; 0 where it has none."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", read_text(path), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
