"""/v1/aliases: names that stand for an adapter, a version, or a split between several."""

from functools import partial
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends
from pydantic import Field, model_validator

from swaplora_adapters.files.naming import validate_alias
from swaplora_adapters.store.records import Canary, Target
from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.cards import alias_body
from swaplora_server.http.dependencies import Serving, refuse_unknown_parameters
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.transport.models import ClosedModel

router = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])
MAX_TARGETS = 16
MAX_WEIGHT = 1_000_000


class WeightedTarget(ClosedModel):
    """One side of a split."""

    target: str = Field(min_length=1, max_length=256)
    weight: int = Field(ge=0, le=MAX_WEIGHT)


class CanaryBody(ClosedModel):
    """One of the targets, a version, and how often it may fail before it gets no more requests."""

    target: str = Field(min_length=1, max_length=256)
    max_error_rate: float = Field(ge=0, lt=1)
    min_requests: int = Field(20, ge=1, le=1_000_000)
    window_seconds: float = Field(300, ge=1, le=86_400)


class AliasBody(ClosedModel):
    """Either `target`, or `targets` with their weights, of which one may be a canary."""

    target: str | None = Field(None, min_length=1, max_length=256)
    targets: list[WeightedTarget] | None = Field(None, min_length=1, max_length=MAX_TARGETS)
    canary: CanaryBody | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.target is None) == (self.targets is None):
            raise ValueError("give either target, or targets with a weight each")
        if self.targets is not None and not any(target.weight for target in self.targets):
            raise ValueError("targets: at least one weight must be greater than 0")
        if self.targets is not None and len({target.target for target in self.targets}) < len(self.targets):
            raise ValueError("targets: one is given twice")
        if self.canary is not None:
            self._check_canary(self.canary.target)
        return self

    def _check_canary(self, target: str) -> None:
        weights = {each.target: each.weight for each in self.targets or []}
        if target not in weights or "@" not in target:
            raise ValueError("canary: its target must be one of the targets, and a version, such as mine@3")
        if not any(weight for other, weight in weights.items() if other != target):
            raise ValueError("canary: another target must have a weight greater than 0, or nobody could take over")

    def as_targets(self) -> list[Target]:
        if self.targets is None:
            return [Target(self.target or "", 1)]
        return [Target(target.target, target.weight) for target in self.targets]


@router.get("/v1/aliases")
@needs(KeyScope.READ)
async def list_aliases(service: Serving) -> dict[str, Any]:
    """Every alias, in order."""
    service.check_serving()
    aliases = service.registry.names.index.aliases()
    return {"object": "list", "data": [alias_body(alias) for alias in aliases]}


@router.get("/v1/aliases/{alias:path}")
@needs(KeyScope.READ)
async def get_alias(service: Serving, alias: str) -> dict[str, Any]:
    """One alias."""
    service.check_serving()
    return alias_body(service.registry.names.index.alias(alias))


@router.put("/v1/aliases/{alias:path}", openapi_extra=body_schema(AliasBody))
@needs(KeyScope.WRITE)
async def put_alias(
    service: Serving, alias: str, body: Annotated[AliasBody, Depends(json_body(AliasBody))]
) -> dict[str, Any]:
    """Make an alias or point it elsewhere, durably: requests that are admitted from now on follow it."""
    service.check_serving()
    validate_alias(alias)
    canary = None if body.canary is None else Canary(**body.canary.model_dump())
    return alias_body(await service.change(partial(service.registry.put_alias, alias, body.as_targets(), canary)))


@router.delete("/v1/aliases/{alias:path}")
@needs(KeyScope.WRITE)
async def delete_alias(service: Serving, alias: str) -> dict[str, Any]:
    """Unknown for new requests at once; what it led to stays."""
    service.check_serving()
    await service.change(partial(service.registry.delete_alias, alias))
    return {"object": "alias.deleted", "alias": alias}
