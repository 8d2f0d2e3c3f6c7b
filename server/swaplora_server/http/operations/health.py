"""The public routes: alive, ready, version, and SageMaker's ping."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from swaplora_server.http.auth import public
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.described import TEXT, answers, object_of
from swaplora_server.version import VERSION

router = APIRouter()


@router.get("/health", responses=answers(object_of(status=TEXT), 200, 503))
@public
async def health(service: Serving) -> JSONResponse:
    """200 while the engine's heart beats, or while the server starts; 503 once it does not."""
    return JSONResponse(
        {"status": "ok"} if service.is_healthy else {"status": "engine failed"}, _status(service.is_healthy)
    )


@router.get("/health/ready", responses=answers(object_of(ready={"type": "boolean"}), 200, 503))
@public
async def ready(service: Serving) -> JSONResponse:
    """200 while new requests are taken; 503 while starting or shutting down."""
    return JSONResponse({"ready": service.is_ready}, _status(service.is_ready))


@router.get("/ping", response_class=Response, responses={503: {}})
@public
async def ping(service: Serving) -> Response:
    """SageMaker's question whether to send requests: 200 or 503, as for readiness."""
    return Response(status_code=_status(service.is_ready))


@router.get("/version")
@public
async def get_version(service: Serving) -> dict[str, Any]:
    """This program's version and what it computes with, which is null while it starts."""
    return {"version": VERSION, **service.computes_with()}


def _status(is_good: bool) -> int:
    return 200 if is_good else 503
