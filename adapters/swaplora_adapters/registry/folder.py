"""A folder of the operator's whose sub-folders are adapters: what is new or changed in it is taken in."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from swaplora_adapters.artifact.names import CONFIG_FILE
from swaplora_adapters.errors import AdapterError, StorageFullError
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.registry.sources.folder import origin_of


class AdapterFolder:
    """Looks when told to, and by itself between `start` and `stop`. What leaves the folder is served on until deleted.

    What was taken in is remembered with the files' times and sizes, durably: an unchanged sub-folder is not taken in
    again, neither over an upload or a roll-back of the same name, nor after a delete.
    """

    def __init__(self, registry: Registry, folder: Path, report: Callable[[str, Exception], None]) -> None:
        """`report` hears of every sub-folder that cannot be taken in, and why; once, until its files change."""
        self._registry = registry
        self._folder = folder
        self._report = report
        self._refused: dict[str, str] = {}
        self._is_stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def scan(self) -> None:
        """Take in what is new or changed."""
        for name, origin in self._found():
            if origin not in (self._registry.names.origin(name), self._refused.get(name)):
                try:
                    self.take_in(name)
                except (AdapterError, OSError) as error:
                    if not isinstance(error, StorageFullError):
                        self._refused[name] = origin
                    self._report(name, error)

    def take_in(self, name: str) -> None:
        """Make the sub-folder `name` the current version of that name.

        Raises AdapterError; SourceNotFoundError if there is no such sub-folder.
        """
        origin = origin_of(self._folder / name)
        self._registry.put_source(name, f"file:{name}")
        self._registry.names.set_origin(name, origin)

    def start(self, interval: float) -> None:
        """Scan every `interval` seconds, until `stop`."""
        self._thread = threading.Thread(target=self._watch, args=(interval,), name="adapter-folder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, interval: float) -> None:
        while not self._is_stopping.wait(interval):
            try:
                self.scan()
            except Exception as error:  # noqa: BLE001 - the thread's boundary: one bad look must not be the last
                self._report(self._folder.name, error)

    def _found(self) -> Iterator[tuple[str, str]]:
        """Name and origin of every sub-folder that holds a config, in order of name."""
        try:
            names = sorted(entry.name for entry in os.scandir(self._folder) if entry.is_dir())
        except OSError as error:
            self._report(self._folder.name, error)
            return
        for name in names:
            if (self._folder / name / CONFIG_FILE).exists():
                yield name, origin_of(self._folder / name)
