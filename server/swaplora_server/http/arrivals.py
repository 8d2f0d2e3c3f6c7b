"""Adapters that come without an upload: from the operator's folder, and by being asked for where a resolver is set."""

from collections.abc import Callable
from pathlib import Path

from swaplora_adapters.errors import AdapterFailedError, InvalidAdapterError
from swaplora_adapters.registry.folder import AdapterFolder
from swaplora_adapters.registry.index import parse_reference
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.registry.sources.resolver import Resolver
from swaplora_server.http.shared import result_of


class Arrivals:
    """Looks into the folder at `start` and then now and again, and for a single name when a request names it.

    A name that was ever used is never looked for: what was deleted does not come back by being asked for.
    """

    def __init__(
        self, registry: Registry, folder: Path | None, template: str | None, report: Callable[[str, Exception], None]
    ) -> None:
        """`template` is a source with `{name}` in it; `report` hears of what was found and could not be taken in."""
        self._registry = registry
        self._folder = None if folder is None else AdapterFolder(registry, folder, report)
        self._resolver = Resolver(self._take_in, has_folder=folder is not None, template=template)

    def start(self, interval: float) -> None:
        """Look into the folder now, and every `interval` seconds from now on unless that is 0."""
        if self._folder is not None:
            self._folder.scan()
            if interval:
                self._folder.start(interval)

    def stop(self) -> None:
        if self._folder is not None:
            self._folder.stop()
        self._resolver.close()

    async def bring(self, reference: str) -> bool:
        """Whether the adapter that `reference` names, and that was not here, is now.

        Raises AdapterFailedError for one that was found and does not fit, SourceFailedError for a source that cannot be
        asked, AdapterNotFoundError for what no adapter can be called.
        """
        name = parse_reference(reference).name
        if self._registry.names.was_used(name):
            return name in self._registry.names.index
        try:
            return await result_of(self._resolver.find(name))
        except InvalidAdapterError as error:
            raise AdapterFailedError(f"{name} was found, and cannot be used: {error}") from error

    def _take_in(self, name: str, uri: str) -> None:
        if self._folder is not None and uri.startswith("file:"):
            self._folder.take_in(name)
        else:
            self._registry.put_source(name, uri, is_operators=True)
