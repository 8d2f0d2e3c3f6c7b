"""Tasks that gates name, each a file called by its digest.

gates/<sha256 of the task>.jsonl
"""

import hashlib
import os
import secrets
from collections.abc import Collection
from pathlib import Path

from swaplora_adapters.errors import StorageFailedError
from swaplora_adapters.files.disk import StoreError, raising_storage_errors, sync_folder
from swaplora_adapters.store.shared.extras import Extras
from swaplora_adapters.store.staging import Writer
from swaplora_server.evaluation.task import MAX_TASK_BYTES, Task, TaskError, parse_task

_PARTIAL = ".part"  # on its way in


class TaskFiles:
    """What lies in one folder. Any thread may ask."""

    def __init__(self, folder: Path, extras: Extras | None = None) -> None:
        """Made if need be. Servers with `extras` share all tasks. Raises StoreError."""
        if folder.is_symlink():
            raise StoreError(f"{folder} is a link, and nothing in a data directory may be one")
        folder.mkdir(mode=0o700, exist_ok=True)
        for partial in folder.glob(f"*{_PARTIAL}"):  # a crash has left it
            partial.unlink()
        self._folder = folder
        self._extras = extras

    def put(self, task: Task) -> None:
        """Keep it, durable when this returns. Raises StorageFullError and StorageFailedError."""
        content = "".join(f"{item.canonical}\n" for item in task.items).encode()
        partial = self._folder / f"{secrets.token_hex(8)}{_PARTIAL}"
        with raising_storage_errors():
            try:
                with Writer(partial, len(content)) as writer:
                    writer.write(content)
                partial.replace(self._path(task.digest))
            finally:
                partial.unlink(missing_ok=True)
            sync_folder(self._folder)

    def share(self, digest: str, revision: int, *, is_named: bool) -> None:
        """Have all servers know one that is kept here, for the change with this revision, in which it is named.

        One that `is_named` before that change is there, unless it was lost. Raises StorageFailedError.
        """
        if self._extras is not None:
            path = self._path(digest)
            if not (is_named and self._extras.has_task(path.stem)):
                with raising_storage_errors():
                    content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != path.stem:
                    raise StorageFailedError(f"the file of the task {digest} is damaged: set the gate again")
                self._extras.put_task(path.stem, content, revision)

    def read(self, digest: str) -> Task:
        """Of what is here. Raises TaskError for what is not, or is another by now."""
        try:
            with self._path(digest).open("rb") as file:
                task = parse_task(file.read(MAX_TASK_BYTES + 1).decode())
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"the file of the task {digest} cannot be read") from error
        if task.digest != digest:
            raise TaskError(f"the file of the task {digest} is damaged")
        return task

    def num_bytes(self, digests: Collection[str]) -> int:
        """Of these, as far as they are there. Raises StorageFailedError."""
        for digest in digests:
            self.bring(digest)
        with raising_storage_errors():
            return sum(path.stat().st_size for path in map(self._path, digests) if path.exists())

    def sweep(self, wanted: Collection[str], revision: int) -> None:
        """Remove all but the tasks with these digests, which are those that gates name after that change or later.

        Raises StoreUnreachableError.
        """
        paths = [self._path(digest) for digest in wanted]
        names = {path.name for path in paths}
        with raising_storage_errors():
            for path in self._folder.iterdir():
                if path.name not in names and path.suffix != _PARTIAL:
                    path.unlink(missing_ok=True)
        if self._extras is not None:
            self._extras.sweep_tasks({path.stem for path in paths}, revision)

    def bring(self, digest: str) -> None:
        """Have what was put on another server lie here as well. Raises StorageFullError and StorageFailedError."""
        if not self._path(digest).exists():
            self.bring_anew(digest)

    def bring_anew(self, digest: str) -> None:
        """The same in place of what lies here, which is damaged, if others have it."""
        path, partial = self._path(digest), self._folder / f"{secrets.token_hex(8)}{_PARTIAL}"
        if self._extras is not None and self._extras.fetch_task(path.stem, partial):
            with raising_storage_errors():
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                partial.replace(path)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest.removeprefix('sha256:')}.jsonl"
