"""GET /v1/adapters/{name}/inspect: what an adapter does to each module, in numbers."""

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, Request

from swaplora_adapters.artifact.weights import AdapterWeights
from swaplora_adapters.derive.inspection import inspect_weights, warnings_about
from swaplora_server.http.query import refuse_unknown_parameters
from swaplora_server.http.service import Service
from swaplora_server.http.shared import result_of

router = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])


@router.get("/v1/adapters/{name}/inspect")
async def inspect_adapter(request: Request, name: str) -> dict[str, Any]:
    """Per module: norms, singular values and effective rank of B A, scaling included; and what is odd about them.

    Loads the adapter, or one version as `name@2`, if it is not in memory.
    """
    service: Service = request.app.state.service
    service.check_serving()
    service.registry.names.index.resolve_name(name)  # no alias: one that splits would show a side at random
    lease = service.registry.lease(name)
    try:
        weights = await result_of(lease.weights)
        found = await asyncio.to_thread(_inspect, weights)
    finally:
        lease.release()
    record = lease.record
    named = {"object": "adapter.inspection", "name": record.name, "version": record.version, "digest": record.digest}
    return named | found | {"warnings": [*record.warnings, *found["warnings"]]}


def _inspect(weights: AdapterWeights) -> dict[str, Any]:
    modules = inspect_weights(weights)
    return {"modules": [asdict(module) for module in modules], "warnings": warnings_about(modules)}
