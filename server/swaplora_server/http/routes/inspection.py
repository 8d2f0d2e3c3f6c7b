"""GET /v1/adapters/{name}/inspect: what an adapter does to each module, in numbers."""

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request

from swaplora_adapters.derive.inspect_weights import compare_weights, inspect_weights, warnings_about
from swaplora_adapters.registry.leases import Lease
from swaplora_adapters.store.records import VersionRecord
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving, refuse_unknown_parameters
from swaplora_server.http.sse import until_disconnect
from swaplora_server.service.adapters.derivations import Count, Counts, Derivations
from swaplora_server.service.service import Service
from swaplora_server.service.wakeups import result_of

T = TypeVar("T")
router = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])


@router.get("/v1/adapters/{name}/inspect")
@needs(KeyScope.READ)
async def inspect_adapter(
    request: Request,
    service: Serving,
    name: str,
    against: Annotated[str | None, Query(min_length=1, max_length=256)] = None,
    intruders: bool = False,
) -> dict[str, Any]:
    """Per module: norms, singular values and effective rank of B A, scaling included; and what is odd about them.

    `relative_norm` is that of B A over that of the base's weight. With `against` each module says how much it points
    the way of another adapter's. With `intruders`, how many of its ten largest directions the base did not have: that
    takes long. Loads the adapter, or one version as `name@2`, if it is not in memory. Ends with its client.
    """
    service.check_serving()
    return await until_disconnect(request.receive, _inspection(service, name, against, intruders=intruders))


async def _inspection(service: Service, name: str, against: str | None, *, intruders: bool) -> dict[str, Any]:
    async with _loaded(service, name, *([] if against is None else [against])) as [(record, weights), *others]:
        found = await _done(service, partial(_inspect, weights, service.derivations))
        for other in others:
            found |= await _compare(service, weights, *other, found["modules"])
    if intruders:
        count = partial(_in_a_folder, service, record)
        counts = await service.derivations.count_intruders(service.tenant, record.digest, count)
        found["modules"] = [module | {"intruders": counts[module["module"]]} for module in found["modules"]]
    named = {"object": "adapter.inspection", "name": record.name, "version": record.version, "digest": record.digest}
    return named | found | {"warnings": [*record.warnings, *found["warnings"]]}


@asynccontextmanager
async def _loaded(service: Service, *names: str) -> AsyncIterator[list[tuple[VersionRecord, AdapterWeights]]]:
    """Versions, in memory together."""
    leases: list[Lease] = []
    with ExitStack() as undo:
        for name in names:
            service.registry.names.check_is_own(name)  # cosines with enough others would give its weights away
            service.registry.names.index.resolve_name(name)  # no alias: one that splits would show a side at random
            leases.append(service.registry.lease(name))
            undo.callback(leases[-1].release)
        request_leases = service.registry.lease_weights(leases)
        undo.pop_all()
    try:
        weights = await result_of(request_leases.weights)
        yield [(lease.record, weights[lease.record.digest]) for lease in leases]
    finally:
        request_leases.release()


async def _done(service: Service, job: Callable[[], T]) -> T:
    """What `job` returns, when it is the tenant's turn."""
    return await service.derivations.inspections.do(service.tenant, lambda _cancellation: job())


def _inspect(weights: AdapterWeights, derivations: Derivations) -> dict[str, Any]:
    modules = inspect_weights(weights)
    norms = {m.module: derivations.base_files.norm(m.module, derivations.shapes[m.module]) for m in modules}
    shown = [asdict(m) | {"relative_norm": _ratio(m.norm, norms[m.module])} for m in modules]
    return {"modules": shown, "warnings": warnings_about(modules)}


def _ratio(norm: float, base_norm: float | None) -> float | None:
    """None where the base's files do not have the weight, or have zeros."""
    return norm / base_norm if base_norm else None


async def _compare(
    service: Service,
    weights: AdapterWeights,
    record: VersionRecord,
    other: AdapterWeights,
    modules: list[dict[str, Any]],
) -> dict[str, Any]:
    likeness = await _done(service, partial(compare_weights, weights, other))
    named = {"name": record.name, "version": record.version, "digest": record.digest, "cosine": likeness.overall}
    return {
        "against": named,
        "modules": [module | {"cosine": likeness.modules.get(module["module"])} for module in modules],
    }


def _in_a_folder(service: Service, record: VersionRecord, count: Count) -> Counts:
    """What `count` makes of a version's files, which no delete reaches meanwhile. In the derivations' thread."""
    with service.registry.stage() as linked:
        folder = linked.path / "adapter"
        service.registry.names.link_files(f"{record.name}@{record.version}", folder)
        return count(str(folder))
