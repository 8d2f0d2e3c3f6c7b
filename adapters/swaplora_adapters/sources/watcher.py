"""Folders of the operator's that are taken in: one under a name, or all the sub-folders of one that is watched."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from swaplora_adapters.errors import (
    AdapterError,
    AdapterTooLargeError,
    InvalidAdapterError,
    InvalidAdapterNameError,
    PreconditionFailedError,
)
from swaplora_adapters.files.naming import CONFIG_FILE, validate_name
from swaplora_adapters.priority import lower_priority
from swaplora_adapters.registry.card import PutResult
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.sources.folder import ReplacedMeanwhileError, fetch_from_folder, origin_of
from swaplora_adapters.sources.uri import FolderUri
from swaplora_adapters.store.conditions import Conditions, NameState, TakenInError

_ANY_SIZE = 1 << 62  # which only memory limits


def put_folder(registry: Registry, name: str, folder: Path) -> None:
    """Take in an adapter from any folder of the operator's, wherever its links lead, as if it had been uploaded.

    Not again while its files are unchanged, so that a restart undoes no upload, roll-back or delete.
    """
    registry.names.check_adapter_name(name)
    origin = origin_of(folder)
    if registry.names.has_read(name, origin):
        return
    with registry.stage() as staging:
        fetch_from_folder(FolderUri(os.path.abspath(folder)), Path("/"), staging, _ANY_SIZE)
        conditions = Conditions(if_news=True)
        put = partial(registry.put, name, staging, source=f"folder:{folder.name}", conditions=conditions)
        _take_in(registry, name, origin, put)


def _take_in(registry: Registry, name: str, origin: str, put: Callable[[], PutResult]) -> None:
    """Make what `put` publishes the current version, unless it was taken in before, here or by another server."""
    try:
        digest = put().record.digest
    except TakenInError as error:
        digest = error.digest
    registry.names.set_read(name, origin, digest)


class FolderWatcher:
    """Looks when told to, and by itself between `start` and `stop`. What leaves the folder is served on until deleted.

    What was taken in is remembered by its digest, on all servers that share a store, and what this one has read with
    the files' times and sizes, both durably: an unchanged sub-folder is not taken in again, neither over an upload or a
    roll-back of the same name, nor after a delete.
    """

    def __init__(self, registry: Registry, folder: Path, report: Callable[[str, Exception], None]) -> None:
        """`report` hears of every sub-folder that cannot be taken in, and why; once, until that or its files change."""
        self._registry = registry
        self._folder = folder
        self._report = report
        self._refused: dict[str, str] = {}
        self._told: dict[str, tuple[str, str]] = {}
        self._is_stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def scan(self) -> None:
        """Take in what is new or changed."""
        for name, origin in self._found():
            if self._is_stopping.is_set():
                return
            state = self._registry.names.state(name)
            if not (self._registry.names.has_read(name, origin) or origin == self._refused.get(name)):
                self._try(name, origin, state)

    def take_in(self, name: str, since: NameState) -> None:
        """Make the sub-folder `name` the current version of that name.

        Raises AdapterError; SourceNotFoundError if there is no such sub-folder, PreconditionFailedError if the name is
        no more as it was `since`.
        """
        self._registry.names.check_adapter_name(name)
        origin = origin_of(self._folder / name)
        conditions = Conditions(if_unchanged_since=since, if_news=True)
        put = partial(self._registry.put_source, name, f"file:{name}", conditions=conditions)
        _take_in(self._registry, name, origin, put)

    def start(self, interval: float) -> None:
        """Scan every `interval` seconds, until `stop`."""
        self._thread = threading.Thread(target=self._watch, args=(interval,), name="adapter-folder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin no further sub-folder, and no further scan."""
        self._is_stopping.set()

    def join(self, until: float) -> None:
        """After `stop`: wait for the scan that runs, to the moment `until` of the monotonic clock at most."""
        if self._thread is not None:
            self._thread.join(max(0.0, until - time.monotonic()))

    def _watch(self, interval: float) -> None:
        lower_priority()
        while not self._is_stopping.wait(interval):
            try:
                self.scan()
            except Exception as error:  # noqa: BLE001 - the thread's boundary: one bad look must not be the last
                self._tell("", "", error)

    def _try(self, name: str, origin: str, since: NameState) -> None:
        try:
            self.take_in(name, since)
        except (PreconditionFailedError, ReplacedMeanwhileError):
            return  # it changes just now: the next scan looks again
        except (AdapterError, OSError) as error:
            if _is_lasting(name, error):
                self._refused[name] = origin
            self._tell(name, origin, error)
        else:
            self._told.pop(name, None)

    def _tell(self, name: str, origin: str, error: Exception) -> None:
        """Report it unless the same was the last that was told of the same files. No name means the whole folder."""
        told = (origin, str(error))
        if self._told.get(name) != told and not self._is_stopping.is_set():
            self._told[name] = told
            self._report(name or self._folder.name, error)

    def _found(self) -> Iterator[tuple[str, str]]:
        """Name and origin of every sub-folder that holds a config, in order of name."""
        try:
            names = sorted(entry.name for entry in os.scandir(self._folder) if entry.is_dir())
        except OSError as error:
            self._tell("", "", error)
            return
        self._told.pop("", None)
        for name in names:
            if os.path.exists(self._folder / name / CONFIG_FILE):
                yield name, origin_of(self._folder / name)


def _is_lasting(name: str, error: Exception) -> bool:
    """Whether the same files under this name would be refused again, whatever else changes."""
    try:
        validate_name(name)
    except InvalidAdapterNameError:
        return True
    return isinstance(error, InvalidAdapterError | AdapterTooLargeError)
