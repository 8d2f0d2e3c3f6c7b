"""A folder that is written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def require_new(out: Path) -> None:
    """Raise FileExistsError if `out` is there and not an empty folder."""
    if out.exists() and (not out.is_dir() or next(out.iterdir(), None) is not None):
        raise FileExistsError(f"{out} is there already, and not an empty folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` once the block has ended well. Raises OSError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        part = Path(folder) / out.name
        part.mkdir()
        yield part
        share_files(part)
        part.rename(out)


def share_files(folder: Path) -> None:
    """Let whoever may look into a folder read its files: safetensors makes its own for their writer alone."""
    for path in folder.iterdir():
        path.chmod(folder.stat().st_mode & 0o666)
