"""POST /v1/merged: a new adapter made of stored ones, or a merged model with weights of its own."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Self

from fastapi import APIRouter, Depends, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse

from swaplora_adapters.cancellation import Cancellation
from swaplora_adapters.config.parse import MAX_RANK
from swaplora_adapters.derive.deriver import StoredIngredient
from swaplora_adapters.derive.recipe import OPTIONAL, REQUIRED, Method, Recipe
from swaplora_adapters.registry.card import PutResult
from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.cards import CARD, put_body
from swaplora_server.http.dependencies import Serving, refuse_unknown_parameters
from swaplora_server.http.described import answers
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.transport.models import ClosedModel
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service

router = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])
MAX_INGREDIENTS = 16
MAX_SCALE = 1e3


class Ingredient(ClosedModel):
    """A stored adapter, or one version of it as `name@2`, and how much of it."""

    name: str = Field(min_length=1, max_length=256)
    scale: float = Field(1.0, ge=-MAX_SCALE, le=MAX_SCALE)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.scale:
            raise ValueError("a scale of 0 leaves the adapter out: leave it out of the list")
        return self


class MergedBody(ClosedModel):
    """What to call the new adapter, and what to make it of."""

    name: str = Field(min_length=1, max_length=128)
    ingredients: list[Ingredient] = Field(alias="from", min_length=1, max_length=MAX_INGREDIENTS)
    method: Method = "sum"
    density: float | None = Field(None, gt=0, le=1)
    rank: int | None = Field(None, ge=1, le=MAX_RANK)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    materialise: bool = False


@router.post("/v1/merged", openapi_extra=body_schema(MergedBody), responses=answers(CARD, 200, 201))
@needs(KeyScope.WRITE)
async def compose_adapter(
    request: Request, service: Serving, body: Annotated[MergedBody, Depends(json_body(MergedBody))]
) -> JSONResponse:
    """Make an adapter of others: 201 for a name's first version, 200 after. When this answers, it is durable.

    The same request of the same versions gives the same bytes, and so no further version. A client that goes before
    it is made takes the work with it, and nothing is published.
    """
    service.check_serving()
    recipe = _recipe(body)
    service.registry.names.check_adapter_name(body.name)
    chosen = _chosen(service, body.ingredients)
    compose = partial(_compose, service, body.name, chosen, recipe, body.materialise)
    put = await until_disconnect(request.receive, service.derivations.makes.do(service.tenant, compose))
    return JSONResponse(put_body(service, put), 201 if put.is_first else 200)


def _recipe(body: MergedBody) -> Recipe:
    """Raises RequestError for a parameter that the method needs and lacks, or has and does not know."""
    given = {name for name in ("density", "rank", "seed") if getattr(body, name) is not None}
    for name in sorted(given - REQUIRED[body.method] - OPTIONAL[body.method]):
        raise RequestError("invalid_request", f"{name} means nothing to method {body.method}; leave it out", name)
    for name in sorted(REQUIRED[body.method] - given):
        raise RequestError("invalid_request", f"method {body.method} needs {name}", name)
    return Recipe(body.method, body.density, body.rank, body.seed)


def _chosen(service: Service, ingredients: Sequence[Ingredient]) -> dict[str, float]:
    """The versions that the names stand for now, as `name@2`, and their scales.

    Raises AdapterNotFoundError, VersionNotFoundError, and RequestError for a version that is listed twice.
    """
    chosen: dict[str, float] = {}
    for ingredient in ingredients:
        record = service.registry.names.index.resolve_name(ingredient.name)
        reference = f"{record.name}@{record.version}"
        if reference in chosen:
            raise RequestError("invalid_request", f"{reference} is listed twice: add up its scales", "from")
        chosen[reference] = ingredient.scale
    return chosen


def _compose(
    service: Service,
    name: str,
    chosen: Mapping[str, float],
    recipe: Recipe,
    materialise: bool,
    cancellation: Cancellation,
) -> PutResult:
    """In the derivations' thread."""
    registry = service.registry
    with registry.stage() as linked, registry.stage() as staging:
        folders = {reference: linked.path / reference for reference in chosen}
        ingredients = [
            StoredIngredient(registry.names.link_files(reference, folder), folder, chosen[reference])
            for reference, folder in folders.items()
        ]
        make = partial(service.derivations.deriver.compose, ingredients, recipe, cancellation, materialise=materialise)
        return registry.put(name, staging, source="composed", make=make)
