"""What control planes of other servers call: vLLM's load and unload, and SageMaker's adapter routes.

Answers are theirs to the letter: plain text for success, and errors both nested under `error` and flat, because
controllers in the field read either.
"""

import json
from contextlib import suppress
from functools import partial

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, PlainTextResponse, Response

from swaplora_adapters.errors import (
    AdapterError,
    AdapterNotFoundError,
    AliasNotFoundError,
    PreconditionFailedError,
    StorageFailedError,
    StoreUnreachableError,
)
from swaplora_adapters.files.naming import stored_name, validate_alias
from swaplora_adapters.registry.card import PutResult
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.sources.uri import uri_of
from swaplora_adapters.store.conditions import Conditions
from swaplora_adapters.store.records import Target
from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.described import ERROR, NUMBER, TEXT, object_of, refused_as
from swaplora_server.http.errors import RETRY_HEADERS, errors_told_by
from swaplora_server.http.refusals import refuse_unsupported
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.transport.body import body_schema, read_json
from swaplora_server.http.transport.models import ClosedModel, WireModel
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service

_TYPES = {404: "NotFoundError"}


def _both_ways(answer: JSONResponse) -> JSONResponse:
    """Our error with vLLM's type, and vLLM's own form of it, whose code is the status, around it."""
    status = answer.status_code
    kind = _TYPES.get(status, "InvalidUserInput" if status < 500 else "InternalServerError")
    error = json.loads(bytes(answer.body))["error"] | {"type": kind}
    flat = {"object": "error", "message": error["message"], "type": kind, "param": None, "code": status}
    retry = {name: value for name, value in answer.headers.items() if name in RETRY_HEADERS}
    return JSONResponse(flat | {"error": error}, status, headers=retry)


_BOTH_WAYS = object_of(message=TEXT, type=TEXT, code=NUMBER, error=object_of(message=TEXT, type=TEXT))
_REFUSED = refused_as({"anyOf": [_BOTH_WAYS, ERROR]})  # a name with a line break leads to no route
router = APIRouter(route_class=errors_told_by(_both_ways), responses=_REFUSED, default_response_class=PlainTextResponse)


class LoadBody(WireModel):
    """vLLM's LoadLoRAAdapterRequest; control planes send more, which it ignores."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=1024)
    load_inplace: bool = False


class UnloadBody(WireModel):
    """vLLM's UnloadLoRAAdapterRequest: the name decides, a `lora_int_id` beside it is ignored there too."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: int | None = None


class RegisterBody(ClosedModel):
    """SageMaker's registration of an adapter."""

    name: str = Field(min_length=1, max_length=256)
    src: str = Field(min_length=1, max_length=1024)
    preload: bool = True
    pin: bool = False


@router.post("/v1/load_lora_adapter", openapi_extra=body_schema(LoadBody))
@needs(KeyScope.WRITE)
async def load_lora_adapter(request: Request, service: Serving) -> Response:
    """Take in an adapter from below the adapter folder, or from an enabled source."""
    body = await read_json(request, service, LoadBody)
    refuse_unsupported(body)
    put = await _load(request, service, body.lora_name, body.lora_path, replace=body.load_inplace)
    return _added(body.lora_name, put)


@router.post("/v1/unload_lora_adapter", openapi_extra=body_schema(UnloadBody))
@needs(KeyScope.WRITE)
async def unload_lora_adapter(request: Request, service: Serving) -> Response:
    """Delete an adapter; requests that run end on it, and are not waited for."""
    body = await read_json(request, service, UnloadBody)
    refuse_unsupported(body)
    return await _unload(service, body.lora_name)


@router.post("/adapters", openapi_extra=body_schema(RegisterBody))
@needs(KeyScope.WRITE)
async def register_adapter(request: Request, service: Serving) -> Response:
    """Take in an adapter, keep it in memory if asked to, and load it now unless told not to: all of it or nothing."""
    body = await read_json(request, service, RegisterBody)
    put = await _load(request, service, body.name, body.src, replace=False, is_pinned=body.pin, is_warm=body.preload)
    return _added(body.name, put)


@router.delete("/adapters/{name:path}")
@needs(KeyScope.WRITE)
async def unregister_adapter(service: Serving, name: str) -> Response:
    """Delete an adapter."""
    return await _unload(service, name)


async def _load(
    request: Request,
    service: Service,
    name: str,
    path: str,
    *,
    replace: bool,
    is_pinned: bool = False,
    is_warm: bool = False,
) -> PutResult:
    """Take it in, and what else is asked for: all of it or nothing. A name with slashes becomes an alias for it.

    A fetch ends with its client; what comes after it does not.
    """
    service.check_serving()
    stored, is_known = name, False
    if "/" in name:
        stored, is_known = _stored_name(service, name), service.registry.names.index.is_alias(name)
    service.registry.names.check_adapter_name(stored)
    fetch = _fetch(service, name, stored, path, replace=replace and (is_known or stored == name))
    put = await until_disconnect(request.receive, fetch)
    try:
        if is_pinned:
            await service.change(partial(service.registry.change, stored, is_pinned=True))
        if is_warm:
            await service.warm(f"{stored}@{put.record.version}")
        if stored != name and not is_known:
            await service.change(partial(service.registry.put_alias, name, [Target(stored, 1)]))
    except AdapterError:
        await service.change(partial(_take_back, service, put))
        raise
    return put


def _stored_name(service: Service, name: str) -> str:
    """What an adapter of a repository's name is called here. Raises RequestError if the name is something else's."""
    names, stored = service.registry.names, stored_name(name)
    validate_alias(name)
    if name == service.settings.base_id:
        raise RequestError("invalid_adapter_name", f"{name} is what the base is called; choose another name")
    if names.index.is_alias(name) and names.index.alias(name).targets != (Target(stored, 1),):
        raise RequestError("invalid_adapter_name", f"{name} is an alias for something else; delete it first")
    return stored


async def _fetch(service: Service, name: str, stored: str, path: str, *, replace: bool) -> PutResult:
    names = service.registry.names
    if_match = names.index.get(stored).current.digest if replace and stored != name and stored in names.index else None
    try:
        conditions = Conditions(if_match=if_match, if_none_match=not replace)
        return await service.ingest.fetch(stored, uri_of(path), conditions=conditions)
    except PreconditionFailedError as error:
        if stored != name and not names.index.is_alias(name):
            message = (
                f"'{name}' is kept as {stored}, and there is an adapter of that name already: choose another name, "
                f"or let this one lead there with PUT /v1/aliases/{name}."
            )
        elif if_match is not None:
            message = f"The lora adapter '{name}' was changed in the meantime; load it again."
        else:
            remedy = "If you want to load the adapter in place, set 'load_inplace' to True."
            message = f"The lora adapter '{name}' has already been loaded. {remedy}"
        raise RequestError("invalid_request", message) from error


def _take_back(service: Service, put: PutResult) -> None:
    """Delete what was just published, and nothing that others put in its place."""
    with suppress(AdapterError):
        service.registry.delete(put.record.name, put.record.version)


async def _unload(service: Service, name: str) -> Response:
    service.check_serving()
    try:
        await service.change(partial(_delete, service.registry, name))
    except (AdapterNotFoundError, AliasNotFoundError) as error:
        raise RequestError("adapter_not_found", f"The lora adapter '{name[:128]}' cannot be found.") from error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _delete(registry: Registry, name: str) -> None:
    """An adapter; of a repository's name the alias and what it leads to, or neither."""
    stored = stored_name(name)
    if stored == name:
        registry.delete(name)
        return

    def check() -> None:
        if registry.names.index.alias(name).targets != (Target(stored, 1),):
            raise AdapterNotFoundError(name)

    registry.delete_alias(name, check)
    try:
        registry.delete(stored)
    except AdapterError as error:
        try:
            if not registry.names.index.is_alias(name):  # which others have made meanwhile
                registry.put_alias(name, [Target(stored, 1)])
        except StorageFailedError:
            message = f"{error}; {name} leads nowhere now, and the adapter may be there yet: delete {stored}"
            raise StoreUnreachableError(message) from error
        except AdapterNotFoundError:
            pass  # it is deleted all the same, and only that was not heard
        raise


def _added(name: str, put: PutResult) -> Response:
    said, current = f"Success: LoRA adapter '{name}' added successfully", put.card.record.version
    if put.record.version != current:
        held = f"as version {put.record.version}, which its gate holds back ({put.record.standing})"
        said = f"{said} {held}: version {current} answers until it has passed"
    return PlainTextResponse(f"{said}.")
