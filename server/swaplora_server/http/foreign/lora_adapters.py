"""GET and POST /lora-adapters: llama.cpp's list of adapters, by whose ids a request's `lora` names them."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field, RootModel

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving
from swaplora_server.http.foreign.fields import MAX_SCALED_IDS, ScaledId
from swaplora_server.http.foreign.names import id_of, names_of
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.transport.models import Body
from swaplora_server.service.errors import RequestError

router = APIRouter()


class ScalesBody(RootModel[Annotated[list[ScaledId], Field(max_length=MAX_SCALED_IDS, fail_fast=True)]], Body):
    """What every request that has no `lora` would be answered with."""


@router.get("/lora-adapters")
@needs(KeyScope.GENERATE, KeyScope.READ)
async def list_lora_adapters(service: Serving) -> list[dict[str, Any]]:
    """Every adapter that is not known to be damaged. `path` is its name, `scale` what a request is given unasked."""
    service.check_serving()
    cards = await asyncio.to_thread(service.registry.cards)
    names = [card.record.name for card in cards if card.state != "failed"]
    return [{"id": id_of(name), "path": name, "scale": 0.0} for name in names]


@router.post("/lora-adapters", openapi_extra=body_schema(ScalesBody))
@needs(KeyScope.GENERATE)
async def set_scales(service: Serving, body: Annotated[ScalesBody, Depends(json_body(ScalesBody))]) -> dict[str, bool]:
    """Taken where all scales are 0, as they are. Others would change who answers everybody else."""
    service.check_serving()
    names_of(service, body.root, "")
    for number, one in enumerate(body.root):
        if one.scale:
            message = "no scale is kept between requests, whose answers it would change: send lora with each request"
            raise RequestError("unsupported_field", message, f"[{number}].scale")
    return {"success": True}
