"""/v1/adapters: upload, fetch, list, look at, roll back, pin, warm, delete."""

import asyncio
from functools import partial
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse

from swaplora_adapters.derive.deriver import DEFAULT_ENERGY
from swaplora_adapters.files.naming import MAX_SAID_CHARS, TENANT
from swaplora_adapters.registry.card import PutResult
from swaplora_adapters.registry.index import EVERYBODY
from swaplora_adapters.store.conditions import Conditions
from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.cards import CARD, card_body, put_body, whole_body
from swaplora_server.http.dependencies import Serving, refuse_unknown_parameters
from swaplora_server.http.described import TEXT, answers, object_of
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.transport.body import body_schema, is_json, json_body, read_json
from swaplora_server.http.transport.models import ClosedModel
from swaplora_server.http.upload import receive_files
from swaplora_server.service.adapters.ingest import CancellableMake
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service

router = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])
SharedWith = Annotated[str, Field(pattern=rf"^(?:{TENANT}|\{EVERYBODY})$")]
MAX_SHARED_WITH = 1000
State = Literal["stored", "loading", "resident", "draining", "failed"]


class SourceBody(ClosedModel):
    """Where to fetch an adapter from."""

    source: str = Field(min_length=1, max_length=1024)


class ChangeBody(ClosedModel):
    """What of an adapter can be changed."""

    pinned: bool | None = None
    current: int | None = Field(None, ge=1, le=2**31 - 1)
    shared_with: list[SharedWith] | None = Field(None, max_length=MAX_SHARED_WITH)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pinned is None and self.current is None and self.shared_with is None:
            raise ValueError("give pinned, current, shared_with, or several of them")
        tenants = self.shared_with or []
        if EVERYBODY in tenants and len(tenants) > 1:
            raise ValueError(f"shared_with: {EVERYBODY!r} is everybody: no other stands beside it")
        if len(set(tenants)) < len(tenants):
            raise ValueError("shared_with: one is given twice")
        return self


def _put_schema() -> dict[str, Any]:
    """The two bodies that a PUT takes, for the OpenAPI document."""
    schema = body_schema(SourceBody)
    files = {part: {"type": "string", "format": "binary"} for part in ("config", "weights")}
    form = {"type": "object", "required": [*files], "properties": files}
    schema["requestBody"]["content"]["multipart/form-data"] = {"schema": form}
    return schema


@router.put("/v1/adapters/{name}", openapi_extra=_put_schema(), responses=answers(CARD, 200, 201))
@needs(KeyScope.WRITE)
async def put_adapter(
    request: Request,
    service: Serving,
    name: str,
    if_match: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
    convert: Literal["svd"] | None = None,
    convert_energy: Annotated[float | None, Query(gt=0, le=1, allow_inf_nan=False)] = None,
) -> JSONResponse:
    """Create an adapter or a new version of it: 201 for the first, 200 after. When this answers, it is durable.

    With `convert` one of another kind than LoRA is made into LoRA: each module keeps the smallest rank that holds
    `convert_energy` of the squared singular values of its delta, by default 0.99. A client that goes takes a fetch or a
    conversion with it, and nothing is published; files that have been received whole are published all the same.
    """
    service.check_serving()
    if if_none_match not in (None, "*"):
        raise RequestError("invalid_request", 'If-None-Match can only be "*": create, never replace', "If-None-Match")
    service.registry.names.check_adapter_name(name)
    wanted = None if if_match is None else if_match.strip('"')
    if convert is None and convert_energy is not None:
        raise RequestError("invalid_request", "convert_energy needs convert=svd", "convert_energy")
    conditions = Conditions(if_match=wanted, if_none_match=if_none_match is not None)
    make = None if convert is None else partial(service.derivations.deriver.convert, convert_energy or DEFAULT_ENERGY)
    service.registry.names.changes.check_known()  # rather than receive in vain
    take_in = _fetch if is_json(request.headers.get("content-type", "")) else _receive
    put = await take_in(request, service, name, conditions, make)
    return JSONResponse(put_body(service, put), 201 if put.is_first else 200)


async def _receive(
    request: Request, service: Service, name: str, conditions: Conditions, make: CancellableMake | None
) -> PutResult:
    """Take the two files out of the body."""
    registry = service.registry
    with registry.stage() as staging:
        await receive_files(request, staging, service.settings.max_adapter_bytes, service.upload_threads)
        put = partial(registry.put, name, staging, source="upload", conditions=conditions)
        if make is None:
            return await service.take_in(put)
        making = service.derivations.makes.do(
            service.tenant, lambda cancellation: put(make=partial(make, cancellation))
        )
        return await until_disconnect(request.receive, making)


async def _fetch(
    request: Request, service: Service, name: str, conditions: Conditions, make: CancellableMake | None
) -> PutResult:
    """Get them from the source that the body names."""
    body = await read_json(request, service, SourceBody)
    fetch = service.ingest.fetch(name, body.source, conditions=conditions, make=make)
    return await until_disconnect(request.receive, fetch)


@router.get("/v1/adapters")
@needs(KeyScope.READ)
async def list_adapters(
    service: Serving,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=MAX_SAID_CHARS)] = None,
    state: State | None = None,
) -> dict[str, Any]:
    """Cards in order of name, `limit` of them from the one behind `after` on."""
    service.check_serving()
    cards = await asyncio.to_thread(service.registry.cards)
    chosen = [card for card in cards if (not after or card.record.name > after) and state in (None, card.state)]
    return {
        "object": "list",
        "data": [card_body(service, card) for card in chosen[:limit]],
        "has_more": len(chosen) > limit,
    }


@router.get("/v1/adapters/{name}")
@needs(KeyScope.READ)
async def get_adapter(service: Serving, name: str) -> dict[str, Any]:
    """One card, with what its versions have shown."""
    service.check_serving()
    return whole_body(service, service.registry.card(name))


@router.patch("/v1/adapters/{name}", openapi_extra=body_schema(ChangeBody))
@needs(KeyScope.WRITE)
async def change_adapter(
    service: Serving, name: str, body: Annotated[ChangeBody, Depends(json_body(ChangeBody))], force: bool = False
) -> dict[str, Any]:
    """Roll back or forward (`current`), keep in memory or no longer (`pinned`), let other tenants ask (`shared_with`).

    A version that has not passed the adapter's gate is made current with `force` alone. When this answers, it is
    durable, and nobody whom it is not shared with any more is answered by it from then on.
    """
    service.check_serving()
    if force and body.current is None:
        raise RequestError("invalid_request", "force is for current: say which version", "force")
    change = partial(service.registry.change, name, current=body.current, is_pinned=body.pinned)
    card = await service.change(partial(change, shared_with=body.shared_with, is_forced=force))
    return card_body(service, card)


@router.post("/v1/adapters/{name}/warm")
@needs(KeyScope.WRITE)
async def warm_adapter(request: Request, service: Serving, name: str) -> dict[str, Any]:
    """Load it, or one version as `name@2`, into memory now; answers when it is there, or why it cannot be."""
    service.check_serving()
    warmed = await until_disconnect(request.receive, service.warm(name))
    return card_body(service, service.registry.card(warmed.name))


@router.delete("/v1/adapters/{name}", responses=answers(object_of(object=TEXT, name=TEXT, state=TEXT), 200, 202))
@needs(KeyScope.WRITE)
async def delete_adapter(
    service: Serving,
    name: str,
    version: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
    timeout: Annotated[float, Query(ge=0, le=600, allow_inf_nan=False)] = 30.0,
) -> JSONResponse:
    """Gone for new requests at once. 200 when its memory is free, 202 if requests still run on it after `timeout` s."""
    service.check_serving()
    removal = await service.change(partial(service.registry.delete, name, version))
    freed = asyncio.wrap_future(removal.freed)
    await asyncio.wait({freed}, timeout=timeout)
    body = {
        "object": "adapter.deleted",
        "name": name,
        "versions": [record.version for record in removal.records],
        "state": "deleted" if freed.done() else "draining",
    }
    return JSONResponse(body, 200 if freed.done() else 202)
