"""What control planes of other servers call: vLLM's load and unload, and SageMaker's adapter routes.

Answers are theirs to the letter: plain text for success, and errors both nested under `error` and flat, because
controllers in the field read either.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, PlainTextResponse, Response

from swaplora_adapters.errors import AdapterError, AdapterNotFoundError, PreconditionFailedError
from swaplora_adapters.registry.sources.uri import uri_of
from swaplora_server.http.body import ClosedModel, body_schema, read_json
from swaplora_server.http.errors import ApiError, status_of
from swaplora_server.http.service import Service

router = APIRouter()
_TYPES = {404: "NotFoundError"}


class LoadBody(ClosedModel):
    """vLLM's LoadLoRAAdapterRequest."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=1024)
    load_inplace: bool = False


class UnloadBody(ClosedModel):
    """vLLM's UnloadLoRAAdapterRequest; adapters have no numbers here, so `lora_int_id` can only be left out."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: None = None


class RegisterBody(ClosedModel):
    """SageMaker's registration of an adapter."""

    name: str = Field(min_length=1, max_length=256)
    src: str = Field(min_length=1, max_length=1024)
    preload: bool = True
    pin: bool = False


Route = Callable[..., Awaitable[Response]]


def _errors_both_ways(route: Route) -> Route:
    """A route whose errors are read as either generation of controllers expects them."""

    @wraps(route)
    async def told(*args: Any, **kwargs: Any) -> Response:
        try:
            return await route(*args, **kwargs)
        except (ApiError, AdapterError) as error:
            return _error(status_of(error), str(error))

    return told


@router.post("/v1/load_lora_adapter", openapi_extra=body_schema(LoadBody))
@_errors_both_ways
async def load_lora_adapter(request: Request) -> Response:
    """Take in an adapter from below the adapter folder, or from an enabled source."""
    body = await read_json(request, LoadBody)
    return await _load(_service(request), body.lora_name, body.lora_path, replace=body.load_inplace)


@router.post("/v1/unload_lora_adapter", openapi_extra=body_schema(UnloadBody))
@_errors_both_ways
async def unload_lora_adapter(request: Request) -> Response:
    """Delete an adapter; requests that run end on it, and are not waited for."""
    body = await read_json(request, UnloadBody)
    return await _unload(_service(request), body.lora_name)


@router.post("/adapters", openapi_extra=body_schema(RegisterBody))
@_errors_both_ways
async def register_adapter(request: Request) -> Response:
    """Take in an adapter, keep it in memory if asked to, and load it now unless told not to."""
    body = await read_json(request, RegisterBody)
    service = _service(request)
    answer = await _load(service, body.name, body.src, replace=False)
    if answer.status_code == 200 and body.pin:
        await asyncio.to_thread(service.registry.change, body.name, is_pinned=True)
    if answer.status_code == 200 and body.preload:
        await service.warm(body.name)
    return answer


@router.delete("/adapters/{name}")
@_errors_both_ways
async def unregister_adapter(request: Request, name: str) -> Response:
    """Delete an adapter."""
    return await _unload(_service(request), name)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    service.check_serving()
    return service


async def _load(service: Service, name: str, path: str, *, replace: bool) -> Response:
    try:
        await asyncio.to_thread(service.registry.put_source, name, uri_of(path), if_none_match=not replace)
    except PreconditionFailedError:
        remedy = "If you want to load the adapter in place, set 'load_inplace' to True."
        return _error(400, f"The lora adapter '{name}' has already been loaded. {remedy}")
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def _unload(service: Service, name: str) -> Response:
    try:
        await asyncio.to_thread(service.registry.delete, name)
    except AdapterNotFoundError:
        return _error(404, f"The lora adapter '{name[:128]}' cannot be found.")
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _error(status: int, message: str) -> JSONResponse:
    kind = _TYPES.get(status, "InvalidUserInput" if status < 500 else "InternalServerError")
    told = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"object": "error", **told, "error": told}, status)
