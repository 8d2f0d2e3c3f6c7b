"""All evaluations of a server: kept in a folder of the data directory, a file each, and those that run.

evaluations/<id>.json
"""

import asyncio
import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from swaplora_adapters.errors import StorageFailedError, StorageFullError
from swaplora_adapters.files.disk import StoreError, raising_storage_errors, sync_folder
from swaplora_server.end_rate import MAX_RETRY_SECONDS
from swaplora_server.service.errors import RequestError
from swaplora_server.service.evaluations.record import ENDED_FIRST, Evaluation, State

MAX_KEPT = 200  # of one tenant
MAX_OPEN = 4  # of one tenant, running or in line
NUM_AT_ONCE = 4  # sequences of all that run
_log = structlog.get_logger(__name__)


class Evaluations:
    """What is kept, by id; the file of each is written by any thread, all else is the event loop's."""

    def __init__(self, folder: Path) -> None:
        """Read what is there; what was open when the server ended is interrupted. Raises StoreError."""
        if folder.is_symlink():
            raise StoreError(f"{folder} is a link, and nothing in a data directory may be one")
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        self._kept: dict[str, Evaluation] = {}
        self.runs: dict[str, asyncio.Task[None]] = {}
        self.places = asyncio.Semaphore(NUM_AT_ONCE)
        self.turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # of each tenant one runs
        for path in sorted(folder.glob("*")):
            self._read(path)

    def of(self, tenant: str) -> list[Evaluation]:
        """A tenant's own, newest first."""
        own = [one for one in self._kept.values() if one.tenant == tenant]
        return sorted(own, key=lambda one: (one.created, one.id), reverse=True)

    def get(self, tenant: str, name: str) -> Evaluation:
        """Raises RequestError for what is not there, or another's."""
        found = self._kept.get(name)
        if found is None or found.tenant != tenant:
            message = f"there is no evaluation {name[:64]!r}; GET /v1/evaluations lists them"
            raise RequestError("not_found", message)
        return found

    def admit(self, evaluation: Evaluation) -> None:
        """Take it in, not yet on the disk. Raises RequestError for one more than a tenant may have.

        What a gate asks for has its own room: see `surplus`.
        """
        if evaluation.gate is None:
            self.check_room(evaluation.tenant)
        self._kept[evaluation.id] = evaluation

    def check_room(self, tenant: str) -> None:
        """Raise RequestError where a tenant has as many as it may."""
        own = [one for one in self.of(tenant) if one.gate is None]
        if len(own) >= MAX_KEPT:
            message = f"{MAX_KEPT} evaluations are kept: delete some with DELETE /v1/evaluations/{{evaluation_id}}"
            raise RequestError("quota_exceeded", message)
        if sum(one.is_open for one in own) >= MAX_OPEN:
            message = f"{MAX_OPEN} evaluations run or wait already: wait for one, or cancel it"
            raise RequestError("overloaded", message, retry_seconds=MAX_RETRY_SECONDS)

    def surplus(self, tenant: str) -> list[Evaluation]:
        """Those of a tenant's gates that are to go before another comes."""
        return [one for one in self.of(tenant) if one.gate is not None][MAX_KEPT - 1 :]

    def last_of(self, tenant: str, digests: Iterable[str]) -> dict[str, dict[str, Evaluation]]:
        """Of each of these versions, by task, the last evaluation that was done."""
        found: dict[str, dict[str, Evaluation]] = {digest: {} for digest in digests}
        for one in reversed(self.of(tenant)):
            for model in one.models if one.state is State.DONE else ():
                if model.digest in found:
                    found[model.digest][one.task_digest] = one
        return found

    def whole(self, evaluation: Evaluation) -> dict[str, Any]:
        """What the API tells of it; any thread may ask."""
        with self._lock:
            return evaluation.told_whole()

    def save(self, evaluation: Evaluation) -> None:
        """Write what is kept of it, durable when this returns. Raises StorageFullError and StorageFailedError.

        Of one that has ended only what it came to stays in memory.
        """
        with self._lock, raising_storage_errors():
            if evaluation.id not in self._kept:
                return  # it was deleted meanwhile
            evaluation.settle()
            if not (evaluation.is_open or evaluation.scores):
                return  # it was written, and nothing changes any more
            path = self._path(evaluation.id)
            partial = path.with_suffix(".part")
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(evaluation.model_dump_json().encode())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(self._folder)
            evaluation.shed()

    def save_if_possible(self, evaluation: Evaluation) -> None:
        """The same; what a disk without room does not keep is in memory until the server ends."""
        try:
            self.save(evaluation)
        except (StorageFullError, StorageFailedError) as error:
            _log.warning("an evaluation cannot be kept", evaluation=evaluation.id, reason=str(error))

    def forget(self, evaluation: Evaluation) -> None:
        """Keep it no longer."""
        with self._lock, raising_storage_errors():
            self._kept.pop(evaluation.id, None)
            self._path(evaluation.id).unlink(missing_ok=True)
            sync_folder(self._folder)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _read(self, path: Path) -> None:
        if path.suffix == ".part":
            path.unlink()
            return
        try:
            evaluation = Evaluation.model_validate_json(path.read_bytes())
        except (ValidationError, OSError) as error:
            _log.warning("what is kept of an evaluation cannot be read", file=path.name, reason=type(error).__name__)
            return
        self._kept[evaluation.id] = evaluation
        if evaluation.is_open:
            evaluation.end(State.INTERRUPTED, ENDED_FIRST)
            self.save_if_possible(evaluation)
        evaluation.shed()
