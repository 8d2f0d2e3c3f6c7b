"""The folder beside an adapter's where a run lies until the adapter is there: what it hangs on, and its checkpoints."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swaplora_adapters.derive.whole_models.new_folder import require_new
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_adapters.train.base_model import TrainingError

_RUN_FILE, _RESULT_FILE, _PART_SUFFIX = "run.json", "result.json", ".part"


def require_place(out: Path) -> None:
    """Raise FileExistsError unless the adapter's folder can take this place at the end; `out` has no links in it."""
    require_new(out)
    if out.is_mount():
        raise FileExistsError(f"{out} is a mount point, whose place no folder can take: name a folder in it")


def require(work: Path, facts: Mapping[str, Any], *, resume: bool) -> None:
    """Raise unless a run that hangs on `facts` is there to go on with, or none where none is to be gone on with."""
    before = _read(work / _RUN_FILE)
    if not resume:
        if before is not None:
            raise FileExistsError(f"{work} is there, of a run that did not end: go on with --resume, or remove it")
        if work.exists() and (not work.is_dir() or {file.name for file in work.iterdir()} - _BEGINNINGS):
            raise FileExistsError(f"{work} is there, and of no run: remove it")
        return
    if before is None:
        raise TrainingError(f"{work} has no run to go on with: leave --resume out")
    if others := sorted(name for name, value in facts.items() if name not in before or value != before[name]):
        raise TrainingError(
            f"{', '.join(others)}: not as in the run to go on with; give the same, or leave --resume out"
        )


@contextmanager
def hold(work: Path, facts: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
    """Begin a run, or go on with one; no other process does meanwhile. Raises as `require` does."""
    if not resume:
        work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"another process trains in {work}") from None
        require(work, facts, resume=resume)  # by the one process that has it now
        if not resume:
            _write(work / _RUN_FILE, facts)
        yield
    finally:
        os.close(descriptor)


def end(work: Path, folder: Path, out: Path, result: Mapping[str, Any]) -> None:
    """Move the adapter's complete `folder` to `out`, and remove the run, whose `result` is known until that is done."""
    _write(work / _RESULT_FILE, {**result, "weights": _digest(folder)})
    folder.rename(out)
    clear(work)


def result_of(work: Path, out: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What a run hung on and came to that was killed once its adapter was in its place; None of any other run."""
    facts, result = _read(work / _RUN_FILE), _read(work / _RESULT_FILE)
    if facts is None or result is None or not (out / WEIGHTS_FILE).is_file() or result["weights"] != _digest(out):
        return None
    return facts, result


def clear(work: Path) -> None:
    """Remove a run, and what says of which it is at the end, so that a kill meanwhile leaves that."""
    for folder in work.glob("checkpoint-*"):
        shutil.rmtree(folder)
    shutil.rmtree(work)


_BEGINNINGS = frozenset({_RUN_FILE, _RUN_FILE + _PART_SUFFIX})  # of a run that was killed before it had begun


def _digest(folder: Path) -> str:
    with (folder / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(file: Path) -> dict[str, Any] | None:
    """None for what is not there, or not whole."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    part = file.with_name(file.name + _PART_SUFFIX)
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(file)
