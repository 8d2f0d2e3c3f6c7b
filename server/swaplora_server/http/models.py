"""GET /v1/models: everything that can be called now."""

from typing import Any

from fastapi import APIRouter, Request

from swaplora_adapters.artifact.records import VersionRecord
from swaplora_adapters.errors import AdapterNotFoundError
from swaplora_server.http.errors import ApiError
from swaplora_server.http.service import Service

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The base, and every adapter."""
    service: Service = request.app.state.service
    service.check_serving()
    adapters = [_adapter(service, record) for record in service.registry.current_versions()]
    return {"object": "list", "data": [_base(service), *adapters]}


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """One model, by any name that a request may call it."""
    service: Service = request.app.state.service
    service.check_serving()
    if service.is_base(model):
        return _base(service)
    try:
        record = service.registry.resolve(model)
    except AdapterNotFoundError as error:
        raise ApiError("model_not_found", f"there is no model {model[:128]!r}", "model") from error
    return _adapter(service, record, model)


def _base(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.base_id,
        "object": "model",
        "created": service.started_at,
        "owned_by": "swaplora",
        "root": service.settings.base_id,
        "parent": None,
        "max_model_len": service.max_model_len,
    }


def _adapter(service: Service, record: VersionRecord, called: str | None = None) -> dict[str, Any]:
    return {
        "id": called or record.name,
        "object": "model",
        "created": int(record.created),
        "owned_by": "swaplora",
        "root": record.digest,
        "parent": service.settings.base_id,
        "max_model_len": service.max_model_len,
    }
