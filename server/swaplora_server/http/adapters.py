"""/v1/adapters: upload, list, look at, delete."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import JSONResponse

from swaplora_adapters.artifact.names import validate_name
from swaplora_adapters.registry.registry import Card
from swaplora_server.http.errors import ApiError
from swaplora_server.http.service import Service
from swaplora_server.http.upload import receive_files

router = APIRouter()
_MULTIPART_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["config", "weights"],
                    "properties": {
                        "config": {"type": "string", "format": "binary"},
                        "weights": {"type": "string", "format": "binary"},
                    },
                }
            }
        },
    }
}


@router.put("/v1/adapters/{name}", openapi_extra=_MULTIPART_SCHEMA)
async def put_adapter(
    request: Request,
    name: str,
    if_match: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """Create an adapter or a new version of it: 201 for the first, 200 after. When this answers, it is durable."""
    service: Service = request.app.state.service
    service.check_serving()
    if if_none_match not in (None, "*"):
        raise ApiError("invalid_request", 'If-None-Match can only be "*": create, never replace', "If-None-Match")
    registry = service.registry
    validate_name(name)
    with registry.stage() as staging:
        await receive_files(request, staging, service.settings.max_adapter_bytes)
        put = await asyncio.to_thread(
            registry.put,
            name,
            staging,
            source="upload",
            if_match=if_match if if_match is None else if_match.strip('"'),
            if_none_match=if_none_match is not None,
        )
    return JSONResponse(_card(service, put.card), 201 if put.is_first else 200)


@router.get("/v1/adapters")
async def list_adapters(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=128)] = None,
    state: Annotated[str | None, Query(max_length=16)] = None,
) -> dict[str, Any]:
    """Cards in order of name, `limit` of them from the one behind `after` on."""
    service: Service = request.app.state.service
    service.check_serving()
    cards = await asyncio.to_thread(service.registry.cards)
    chosen = [card for card in cards if (not after or card.record.name > after) and state in (None, card.state)]
    return {
        "object": "list",
        "data": [_card(service, card) for card in chosen[:limit]],
        "has_more": len(chosen) > limit,
    }


@router.get("/v1/adapters/{name}")
async def get_adapter(request: Request, name: str) -> dict[str, Any]:
    """One card."""
    service: Service = request.app.state.service
    service.check_serving()
    return _card(service, service.registry.card(name))


@router.delete("/v1/adapters/{name}")
async def delete_adapter(
    request: Request,
    name: str,
    version: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
    timeout: Annotated[float, Query(ge=0, le=600, allow_inf_nan=False)] = 30.0,
) -> JSONResponse:
    """Gone for new requests at once. 200 when its memory is free, 202 if requests still run on it after `timeout` s."""
    service: Service = request.app.state.service
    service.check_serving()
    removal = await asyncio.to_thread(service.registry.delete, name, version)
    freed = asyncio.wrap_future(removal.freed)
    await asyncio.wait({freed}, timeout=timeout)
    body = {
        "object": "adapter.deleted",
        "name": name,
        "versions": [record.version for record in removal.records],
        "state": "deleted" if freed.done() else "draining",
    }
    return JSONResponse(body, 200 if freed.done() else 202)


def _card(service: Service, card: Card) -> dict[str, Any]:
    """A card as the contract lists it; `base` is this server's, the shapes having been checked against it."""
    record = card.record
    return {
        "object": "adapter",
        "name": record.name,
        "version": record.version,
        "digest": record.digest,
        "base": service.settings.base_id,
        "kind": "lora",
        "rank": record.rank,
        "targets": list(record.targets),
        "parameters": record.num_parameters,
        "bytes": record.nbytes,
        "created": record.created,
        "state": card.state,
        "reason": card.reason,
        "in_flight": card.num_in_flight,
        "last_used": card.last_used,
        "source": record.source,
        "warnings": list(record.warnings),
        "versions": [
            {"version": version.version, "digest": version.digest, "created": version.created, "bytes": version.nbytes}
            for version in card.versions
        ],
    }
