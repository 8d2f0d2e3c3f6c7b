"""/v1/keys: the keys of the file that the server was started with."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import JSONResponse

from swaplora_adapters.files.naming import DEFAULT_TENANT, TENANT
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import KeyFileError, StoredKey, UnknownKeyError
from swaplora_server.http.auth import caller_of, needs
from swaplora_server.http.dependencies import Serving, refuse_unknown_parameters, request_id
from swaplora_server.http.described import OBJECTS, TEXT, answers, object_of
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.transport.models import ClosedModel
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service

router = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])
_log = structlog.get_logger(__name__)
_KEY = {"object": TEXT, "id": TEXT, "tenant": TEXT, "scopes": {"type": "array", "items": TEXT}}


class KeyBody(ClosedModel):
    """Whose the new key is, what it is for, and how long it is good: always, unless `days` says otherwise."""

    tenant: str = Field(DEFAULT_TENANT, pattern=f"^{TENANT}$")
    scopes: list[Annotated[KeyScope, Field(strict=False)]] = Field(
        [KeyScope.GENERATE, KeyScope.READ], min_length=1, max_length=len(KeyScope)
    )
    days: int | None = Field(None, ge=1, le=36500)

    @property
    def expires(self) -> datetime | None:
        return None if self.days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=self.days)


@router.get("/v1/keys", responses=answers(object_of(object=TEXT, data=OBJECTS), 200))
@needs(KeyScope.ADMIN)
async def list_keys(service: Serving) -> dict[str, Any]:
    """Every key of the file, without the keys themselves."""
    with _told():
        keys = await asyncio.to_thread(service.keys.stored)
    return {"object": "list", "data": [_shown(key) for key in keys]}


@router.post(
    "/v1/keys", status_code=201, openapi_extra=body_schema(KeyBody), responses=answers(object_of(key=TEXT, **_KEY), 201)
)
@needs(KeyScope.ADMIN)
async def create_key(
    request: Request, service: Serving, body: Annotated[KeyBody, Depends(json_body(KeyBody))]
) -> JSONResponse:
    """A new key, which is good at once. It is told here, and kept nowhere."""
    with _told():
        scopes = tuple(dict.fromkeys(body.scopes))
        key, stored = await asyncio.to_thread(service.keys.create, body.tenant, scopes, body.expires)
    _note(request, service, "key.create", stored.id)
    return JSONResponse({"key": key, **_shown(stored)}, 201, headers={"cache-control": "no-store"})


@router.delete("/v1/keys/{key_id}", responses=answers(object_of(object=TEXT, id=TEXT), 200))
@needs(KeyScope.ADMIN)
async def revoke_key(request: Request, service: Serving, key_id: str) -> dict[str, Any]:
    """Good no longer, for requests that begin from now on."""
    with _told():
        await asyncio.to_thread(service.keys.revoke, key_id)
    _note(request, service, "key.revoke", key_id)
    return {"object": "key.deleted", "id": key_id}


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong with the file is for the log, which may name it."""
    try:
        yield
    except UnknownKeyError as error:
        message = f"there is no key {error.key_id[:64]!r} in the server's file of keys; GET /v1/keys lists them"
        raise RequestError("not_found", message) from error
    except FileNotFoundError as error:
        raise RequestError("not_found", "the server has no file of keys: start it with --key-file") from error
    except KeyFileError as error:
        _log.error("the file of keys cannot be used", reason=str(error))
        message = "the server's file of keys cannot be read or changed; its log says more"
        raise RequestError("storage_failed", message) from error


def _note(request: Request, service: Service, change: str, key_id: str) -> None:
    service.audit.write(caller_of(request), request_id(), change, key_id, None, None, "done")


def _shown(key: StoredKey) -> dict[str, Any]:
    return {"object": "key", **key.model_dump(mode="json", exclude={"sha256"}, exclude_none=True)}
