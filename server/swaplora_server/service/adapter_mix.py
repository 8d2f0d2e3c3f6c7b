"""Who answers a request: the base alone, one adapter, or a weighted sum of several; each is leased while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from swaplora_adapters.errors import AdapterFailedError, AdapterNotFoundError, AdapterTooLargeError, MemoryFullError
from swaplora_adapters.registry.leases import Lease, RequestLeases
from swaplora_server.engine.request import AdapterUse
from swaplora_server.http.wire import AdapterTerm, GenerationBody
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service
from swaplora_server.service.shared import result_of


@dataclass(frozen=True, slots=True)
class AdapterMix:
    """The adapters whose deltas are added to the base, each times its scale. None of them: the base."""

    request_leases: RequestLeases
    scales: tuple[float, ...]
    params: tuple[str, ...]  # the request's fields that name them

    @property
    def leases(self) -> tuple[Lease, ...]:
        return self.request_leases.leases

    async def uses(self) -> tuple[AdapterUse, ...]:
        """Wait for the weights. Raises RequestError for those that cannot be had, and for what does not add up.

        Raises StorageFailedError as well.
        """
        try:
            weights = await result_of(self.request_leases.weights)
        except (AdapterFailedError, AdapterTooLargeError, MemoryFullError) as error:
            raise RequestError(error.code, str(error), self._param_at_fault()) from error
        digests = [lease.record.digest for lease in self.leases]
        uses = tuple(
            AdapterUse(weights[digest], scale, digest) for digest, scale in zip(digests, self.scales, strict=True)
        )
        if self.scales not in ((), (1.0,)):
            self._check_sum(uses)
        return uses

    def _param_at_fault(self) -> str:
        """The field of the one that cannot be had, or of all of them."""
        if self.request_leases.at_fault is not None:
            return self.params[self.leases.index(self.request_leases.at_fault)]
        return self.params[0] if len(self.params) == 1 else "adapters"

    def _check_sum(self, uses: Sequence[AdapterUse]) -> None:
        for param, use, lease in zip(self.params, uses, self.leases, strict=True):
            if not use.weights.is_sum:
                message = (
                    f"{lease.record.name!r} does more than add to the base (DoRA, modules of its own, an invocation), "
                    "so it has no place in a sum: name it alone, at scale 1"
                )
                raise RequestError("invalid_request", message, param)

    def release(self) -> None:
        """Give back every lease, and the memory."""
        self.request_leases.release()

    @property
    def headers(self) -> dict[str, str]:
        """Which versions answer; of a sum all, in order."""
        if not self.leases:
            return {}
        return {
            "x-swaplora-adapter": ", ".join(f"{lease.record.name}@{lease.record.version}" for lease in self.leases),
            "x-swaplora-digest": ", ".join(lease.record.digest for lease in self.leases),
        }


async def lease_mix(service: Service, body: GenerationBody, client: str | None) -> AdapterMix:
    """Lease all that `body` names, or nothing, and claim memory for it. Raises RequestError, VersionNotFoundError."""
    wanted = _wanted(service, body)
    leases: list[Lease] = []
    try:
        for term, param in wanted:
            leases.append(await lease_model(service, term.name, client, param))
    except BaseException:
        for lease in leases:
            lease.release()
        raise
    scales, params = tuple(term.scale for term, _ in wanted), tuple(param for _, param in wanted)
    return AdapterMix(service.registry.lease_weights(leases), scales, params)


def _wanted(service: Service, body: GenerationBody) -> Sequence[tuple[AdapterTerm, str]]:
    """Each term, and the field of the request that names it."""
    is_base = service.is_base(body.model)
    if body.adapters and not is_base:
        message = f"adapters are added to the base: with them, model is {service.settings.base_id}"
        raise RequestError("invalid_request", message, "model")
    if not is_base:
        return [(AdapterTerm(name=body.model), "model")]
    for number, term in enumerate(body.adapters or ()):
        if service.is_base(term.name):
            raise RequestError("invalid_request", "the base is in every sum already", f"adapters[{number}].name")
    return [(term, f"adapters[{number}].name") for number, term in enumerate(body.adapters or ())]


async def lease_model(service: Service, model: str, client: str | None, param: str = "model") -> Lease:
    """A lease on who `model` stands for, looked for where the operator says if it is not here yet.

    `client` keeps to one side of an alias that splits. Raises RequestError model_not_found, and VersionNotFoundError.
    """
    try:
        try:
            return service.registry.lease(model, client)
        except AdapterNotFoundError:
            if not await service.ingest.resolve(model):
                raise
            return service.registry.lease(model, client)
    except AdapterNotFoundError as error:
        message = f"there is no model {model[:128]!r}; GET /v1/models lists what there is"
        raise RequestError("model_not_found", message, param) from error
