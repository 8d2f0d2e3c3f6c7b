"""Adapters that come without an upload: fetched, from the operator's folder, and by being asked for."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.errors import (
    AdapterFailedError,
    InvalidAdapterError,
    InvalidAdapterNameError,
    OverloadedError,
    PreconditionFailedError,
    SourceNotAllowedError,
)
from swaplora_adapters.registry.card import PutResult
from swaplora_adapters.registry.index import parse_reference
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.sources.resolver import Resolver
from swaplora_adapters.sources.uri import FOLDER
from swaplora_adapters.sources.watcher import FolderWatcher
from swaplora_adapters.store.conditions import UNCONDITIONAL, Conditions, NameState
from swaplora_adapters.store.staging import Staging
from swaplora_server.end_rate import EndRate
from swaplora_server.service.adapters.tenant_jobs import RATE_SECONDS, UNKNOWN_SECONDS, TenantJobs
from swaplora_server.service.errors import RequestError
from swaplora_server.service.wakeups import result_of

NUM_FETCHERS = 5  # of which one tenant has four at most
MAX_FETCHES = 16  # of one tenant, waiting and running
_JOIN_SECONDS = 3.0
# As the registry's Make, but it ends when it is cancelled.
CancellableMake = Callable[[Cancellation, Staging], str]
_NEVER_USED = NameState(was_used=False, version=None)


class Ingest:
    """Looks into the folder at `start` and then now and again, and for a single name when a request names it.

    A name that was ever used is never looked for: what was deleted does not come back by being asked for.
    """

    def __init__(
        self, registry: Registry, folder: Path | None, template: str | None, report: Callable[[str, Exception], None]
    ) -> None:
        """`template` is a source with `{name}` in it; `report` hears of what was found and could not be taken in."""
        self._registry = registry
        self._folder = None if folder is None else FolderWatcher(registry, folder, report)
        self._resolver = Resolver(self._take_in, has_folder=folder is not None, template=template)
        self._fetchers = TenantJobs("adapter-fetch", num_threads=NUM_FETCHERS, most=MAX_FETCHES)
        self._looked = EndRate(seconds=RATE_SECONDS)

    def start(self, interval: float) -> None:
        """Look into the folder now, and every `interval` seconds from now on unless that is 0."""
        if self._folder is not None:
            self._folder.scan()
            if interval:
                self._folder.start(interval)

    def stop(self) -> None:
        """Begin nothing new, and tell all who wait that it ends."""
        if self._folder is not None:
            self._folder.stop()
        self._resolver.stop()
        self._fetchers.stop()

    def join(self) -> None:
        """After `stop`: wait a moment for what runs. What hears nothing from a host is left to end by itself."""
        until = time.monotonic() + _JOIN_SECONDS
        if self._folder is not None:
            self._folder.join(until)
        self._resolver.join(until)
        self._fetchers.join(until)

    async def fetch(
        self,
        name: str,
        uri: str,
        *,
        conditions: Conditions = UNCONDITIONAL,
        make: CancellableMake | None = None,
        registry: Registry | None = None,
        tenant: str = "",
    ) -> PutResult:
        """See `Registry.put_source`, of `registry` if it is another; whoever is cancelled takes the fetch with it.

        Raises RequestError for one more than the tenant may have.
        """
        cancellation = Cancellation()
        put = partial(
            (registry or self._registry).put_source,
            name,
            uri,
            conditions=conditions,
            make=None if make is None else partial(make, cancellation),
            cancellation=cancellation,
        )
        fetch = self._fetchers.submit(tenant, put, cancellation)
        try:
            return await result_of(fetch)
        finally:
            cancellation.leave()

    async def resolve(self, reference: str, peer: str) -> bool:
        """Whether the adapter that `reference` names, and that was not here, is now.

        Looking takes turns between peers, whose addresses tell them apart, and ends with the last who waits.

        Raises AdapterFailedError for one that was found and does not fit, SourceFailedError for a source that cannot be
        asked, RequestError when more would be looked for than is good, and AdapterNotFoundError for what no adapter can
        be called.
        """
        name = parse_reference(reference).name
        names = self._registry.names
        if not names.was_used(name):
            try:
                names.check_is_free(name)
                look = self._resolver.find(name, peer)
                try:
                    await result_of(look.future)
                    self._looked.note()
                finally:
                    look.cancellation.leave()
            except OverloadedError as error:
                seconds = self._looked.retry_seconds(1, UNKNOWN_SECONDS)
                message = f"too many other adapters are being looked for; try again in {seconds} s"
                raise RequestError("overloaded", message, retry_seconds=seconds) from error
            except InvalidAdapterNameError:
                return False
            except InvalidAdapterError as error:
                raise AdapterFailedError(f"{name} was found, and cannot be used: {error}") from error
        return name in names.index

    def _take_in(self, name: str, uri: str, cancellation: Cancellation) -> None:
        """For a look: whoever used the name since it began has it, and what was found is let go."""
        with suppress(PreconditionFailedError):
            if self._folder is not None and uri.startswith("file:"):
                self._folder.take_in(name, _NEVER_USED)
            else:
                conditions = Conditions(if_unchanged_since=_NEVER_USED)
                self._registry.put_source(
                    name, uri, conditions=conditions, is_operators=True, cancellation=cancellation
                )


class TenantIngest:
    """What comes for a tenant without an upload. The adapter folder, and what is looked for, is the default one's."""

    def __init__(self, ingest: Ingest, registry: Registry, tenant: str) -> None:
        """`registry` is the tenant's; `tenant` is "" for the default one."""
        self._ingest = ingest
        self._registry = registry
        self._tenant = tenant

    async def fetch(
        self, name: str, uri: str, *, conditions: Conditions = UNCONDITIONAL, make: CancellableMake | None = None
    ) -> PutResult:
        """See `Ingest.fetch`. Raises SourceNotAllowedError for the adapter folder, which is the default tenant's."""
        if uri.startswith(FOLDER) and self._tenant:
            raise SourceNotAllowedError(
                "the adapter folder is the default tenant's; upload the files, or name a source"
            )
        fetch = partial(self._ingest.fetch, conditions=conditions, make=make, registry=self._registry)
        return await fetch(name, uri, tenant=self._tenant)

    async def resolve(self, reference: str, peer: str) -> bool:
        """See `Ingest.resolve`: looked for by the default tenant alone."""
        return not self._tenant and await self._ingest.resolve(reference, peer)
