"""GET /v1/models: everything that can be called now."""

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import APIRouter

from swaplora_adapters.errors import (
    AdapterNotFoundError,
    AliasNotFoundError,
    MixtureNotFoundError,
    VersionNotFoundError,
)
from swaplora_adapters.store.records import Alias, VersionRecord
from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.foreign.fields import NamingBody
from swaplora_server.http.foreign.names import terms_of
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service

router = APIRouter()


@router.get("/v1/models")
@needs(KeyScope.GENERATE, KeyScope.READ)
async def list_models(service: Serving) -> dict[str, Any]:
    """The base, every adapter that is not known to be damaged, every alias and every mixture."""
    service.check_serving()
    cards = await asyncio.to_thread(service.registry.cards)
    adapters = [_adapter(service, card.record) for card in cards if card.state != "failed"]
    return {"object": "list", "data": [_base(service), *adapters, *_aliases(service)]}


@router.get("/v1/models/{model:path}")
@needs(KeyScope.GENERATE, KeyScope.READ)
async def get_model(service: Serving, model: str) -> dict[str, Any]:
    """One model, by any name that a request may call it; an adapter that is known to be damaged is 409 as for these."""
    service.check_serving()
    found, reference = _model(service, model), service.reference(model)
    with suppress(AdapterNotFoundError):  # it is the base, an alias or a mixture
        service.registry.check_whole(service.registry.names.index.resolve_name(reference))
    return found


def check_model(service: Service, model: str | None) -> None:
    """Raise RequestError unless `model` names somebody, or nobody is named."""
    if model:
        _model(service, model)


def check_named(service: Service, body: NamingBody) -> None:
    """Raise RequestError unless everybody whom `body` names is there."""
    check_model(service, body.model)
    for term in terms_of(service, body):
        _model(service, term.name, term.param)


def _model(service: Service, model: str, param: str = "model") -> dict[str, Any]:
    """Raises RequestError for a name that nobody has."""
    if service.is_base(model):
        return _base(service)
    index, reference = service.registry.names.index, service.reference(model)
    alias = reference.removeprefix("base:")
    try:
        if index.is_alias(alias):
            return _alias(service, index.alias(alias)) | {"id": model}
        if index.is_mixture(alias):
            return _alias(service, index.mixture(alias)) | {"id": model}
        return _adapter(service, index.resolve_name(reference)) | {"id": model}
    except (AdapterNotFoundError, AliasNotFoundError, MixtureNotFoundError) as error:
        raise RequestError("model_not_found", f"there is no model {model[:128]!r}", param) from error


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


def _adapter(service: Service, record: VersionRecord) -> dict[str, Any]:
    return {
        "id": record.name,
        "object": "model",
        "created": int(record.created),
        "owned_by": "swaplora",
        "root": record.digest,
        "parent": service.settings.base_id,
        "max_model_len": service.max_model_len,
    }


def _aliases(service: Service) -> list[dict[str, Any]]:
    """In order, mixtures last, without one that was deleted, and then what it led to, since they were listed."""
    found, index = [], service.registry.names.index
    for alias in (*index.aliases(), *index.mixtures()):
        with suppress(AdapterNotFoundError, VersionNotFoundError):
            found.append(_alias(service, alias))
    return found


def _alias(service: Service, alias: Alias) -> dict[str, Any]:
    """As the version that it leads to; a split or a mixture has no root, since no one digest answers for it."""
    records = [service.registry.names.index.resolve_name(target.reference) for target in alias.targets]
    root = records[0].digest if len(records) == 1 else None
    return _adapter(service, records[0]) | {"id": alias.alias, "root": root}
