"""The service as one caller sees it: all of its parts, but of the adapters those that its tenant may ask."""

from swaplora_adapters.files.naming import DEFAULT_TENANT
from swaplora_adapters.registry.naming import Naming
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.registry.tenant import Change, Room, TenantRegistry
from swaplora_server.access.caller import ANYBODY, Caller
from swaplora_server.access.limits import LimitReachedError, Reservation
from swaplora_server.service.adapters.ingest import Ingest, TenantIngest
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service


class TenantService(Service):
    """What a route works with. The changes that are asked of it are the caller's, in the audit log too."""

    __slots__ = (
        "_caller",
        "_counted_as",
        "_peer",
        "_request_id",
        "_tenant",
    )  # the rest is shared, what comes to be later too

    def __init__(
        self, whole: Service, caller: Caller, request_id: str, peer: str = "", counted_as: str | None = None
    ) -> None:
        """`request_id` is that of the request, as its answer and the log have it; `peer` the address it came from.

        `counted_as` is what it is called in the limits of several servers, see `OwnMeter.begin`.
        """
        self.__dict__ = whole.__dict__
        self._caller = caller
        self._counted_as = counted_as
        self._request_id = request_id
        self._peer = peer if caller is ANYBODY else ""
        self._tenant = "" if caller.tenant == DEFAULT_TENANT else caller.tenant

    @property
    def tenant(self) -> str:
        """Whose requests these are; the default one is nameless."""
        return self._tenant

    @property
    def peer(self) -> str:
        """See `Service.peer`."""
        return self._peer

    @property
    def is_key_good(self) -> bool:
        """See `Service.is_key_good`."""
        return self.keys.is_good(self._caller)

    async def reserve_tokens(self, num_tokens: int, param: str) -> Reservation:
        """See `Service.reserve_tokens`."""
        try:
            return await self.meter.reserve(self._caller.limited, num_tokens, self._counted_as)
        except LimitReachedError as error:
            if error.retry_seconds is None:
                raise RequestError("invalid_request", f"{error}: ask for fewer", param) from error
            raise RequestError("rate_limited", str(error), retry_seconds=error.retry_seconds) from error

    def stored_name(self, name: str) -> str:
        """With its tenant."""
        return Naming(self._tenant).key(name)

    @property
    def registry(self) -> Registry:
        """What the tenant sees of it."""
        limits = self._caller.tenant_limits
        room = Room(limits.adapters, limits.adapter_bytes)
        return TenantRegistry(self._registry, self._tenant, self._note, room)

    @property
    def ingest(self) -> Ingest | TenantIngest:
        """The adapter folder and what is found by being asked for are the default tenant's."""
        return TenantIngest(self._ingest, self.registry, self._tenant)

    def _note(self, change: Change) -> None:
        self.audit.write(
            self._caller,
            self._request_id,
            change.kind,
            change.name,
            change.version,
            change.digest,
            change.outcome,
            change.shared_with,
        )
