"""/v1/mixtures: make, list, show and delete mixtures, and see what the tokens of a prompt take of one."""

import json
from functools import partial
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from swaplora_adapters.errors import AdapterNotFoundError, VersionNotFoundError
from swaplora_adapters.files.naming import validate_name
from swaplora_adapters.store.records import Alias, Mixing
from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs
from swaplora_server.http.dependencies import Serving, refuse_unknown_parameters
from swaplora_server.http.described import NUMBER, OBJECTS, REAL, TEXT, answers, object_of
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.transport.models import ClosedModel
from swaplora_server.http.wire import TokenId
from swaplora_server.service.adapter_mix import lease_members
from swaplora_server.service.admission import Admission
from swaplora_server.service.errors import RequestError
from swaplora_server.service.mixtures.traces import MAX_TRACED_TOKENS, TracedPrompt, trace
from swaplora_server.service.service import Service

router = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])
MAX_MEMBERS = 16
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
_MIXTURE = object_of(object=TEXT, name=TEXT, members={"type": "array", "items": TEXT}, top_k=NUMBER, temperature=REAL)
_TRACE = object_of(object=TEXT, name=TEXT, members={"type": "array", "items": TEXT}, tokens=OBJECTS, modules=OBJECTS)


class MixtureBody(ClosedModel):
    """What to call the mixture, the adapters that it is of, and how each token chooses among them."""

    name: str = Field(min_length=1, max_length=128)
    members: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(min_length=2, max_length=MAX_MEMBERS)
    top_k: int = Field(ge=1, le=MAX_MEMBERS)
    temperature: float = Field(1.0, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > len(self.members):
            raise ValueError(f"top_k is {self.top_k}, and there are {len(self.members)} members")
        return self


class TraceBody(ClosedModel):
    """A text, as /v1/completions would take it, or token ids, such as /tokenize makes of a conversation."""

    has_content = True

    prompt: str | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TRACED_TOKENS)]


@router.post("/v1/mixtures", openapi_extra=body_schema(MixtureBody), responses=answers(_MIXTURE, 200, 201))
@needs(KeyScope.WRITE)
async def put_mixture(
    request: Request, service: Serving, body: Annotated[MixtureBody, Depends(json_body(MixtureBody))]
) -> JSONResponse:
    """Make a mixture, or change one: 201 the first time, 200 after. When this answers, it is durable.

    Its members are loaded together first, so that one which cannot be in it is refused here.
    """
    service.check_serving()
    validate_name(body.name)
    index, mixing = service.registry.names.index, Mixing(body.top_k, body.temperature)
    if body.name in index:
        raise RequestError("invalid_adapter_name", f"{body.name} is an adapter; choose another name", "name")
    if not index.is_mixture(body.name):
        service.registry.names.check_adapter_name(body.name)
    members = [service.reference(member).removeprefix("base:") for member in body.members]
    _check_names(service, members)
    await until_disconnect(request.receive, _try(service, members, mixing))
    made, is_first = await service.change(partial(service.registry.put_mixture, body.name, members, mixing))
    return JSONResponse(mixture_body(made), 201 if is_first else 200)


@router.get("/v1/mixtures", responses=answers(object_of(object=TEXT, data=OBJECTS), 200))
@needs(KeyScope.READ)
async def list_mixtures(service: Serving) -> dict[str, Any]:
    """Every mixture, in order."""
    service.check_serving()
    return {"object": "list", "data": [mixture_body(each) for each in service.registry.names.index.mixtures()]}


@router.get("/v1/mixtures/{name}", responses=answers(_MIXTURE, 200))
@needs(KeyScope.READ)
async def get_mixture(service: Serving, name: str) -> dict[str, Any]:
    """One mixture."""
    service.check_serving()
    return mixture_body(service.registry.names.index.mixture(name))


@router.delete("/v1/mixtures/{name}")
@needs(KeyScope.WRITE)
async def delete_mixture(service: Serving, name: str) -> dict[str, Any]:
    """Unknown for new requests at once; its members stay."""
    service.check_serving()
    await service.change(partial(service.registry.delete_mixture, name))
    return {"object": "mixture.deleted", "name": name}


@router.post("/v1/mixtures/{name}/trace", openapi_extra=body_schema(TraceBody), responses=answers(_TRACE, 200))
@needs(KeyScope.GENERATE)
async def trace_prompt(
    request: Request, service: Serving, name: str, body: Annotated[TraceBody, Depends(json_body(TraceBody))]
) -> Response:
    """Which members each token of a prompt takes, and how much of each, by layer and module."""
    service.check_serving()
    service.check_generating()
    traced = await until_disconnect(request.receive, _traced(service, name, body.prompt))
    return Response(traced, media_type="application/json")


async def _traced(service: Service, name: str, prompt: str | list[int]) -> bytes:
    _check_own(service, name)
    [token_ids] = await service.tokenizer.encode_all([prompt], lambda _number: "prompt", add_special_tokens=True)
    traced = await trace(service, name, token_ids)
    return await service.offload.do(traced.num_choices, partial(_trace_body, service, name, traced))


def _check_own(service: Service, name: str) -> None:
    """Raise NotOwnerError for a mixture with a member that is shared with the tenant; MixtureNotFoundError."""
    names = service.registry.names
    for member in names.index.mixture(name).targets:
        names.check_is_own(member.reference)


def _check_names(service: Service, members: list[str]) -> None:
    """Raise RequestError for a member that is no adapter, is not there, or is listed twice."""
    index, seen = service.registry.names.index, set()
    for member in members:
        for kind, is_kind in (
            ("the base", service.is_base(member)),
            ("an alias", index.is_alias(member)),
            ("a mixture", index.is_mixture(member)),
        ):
            if is_kind:
                message = f"members: {member[:128]} is {kind}, and a mixture is of adapters: name these"
                raise RequestError("invalid_request", message, "members")
        try:
            name = index.resolve_name(member).name
        except (AdapterNotFoundError, VersionNotFoundError) as error:
            raise RequestError(error.code, f"members: {error}; GET /v1/adapters lists them", "members") from error
        if name in seen:
            raise RequestError("invalid_request", f"members: {name} is listed twice", "members")
        seen.add(name)


async def _try(service: Service, members: list[str], mixing: Mixing) -> None:
    """Raise RequestError unless all of them can be loaded, and mixed. AdapterError as well."""
    admission = Admission(lambda _has_run: None)
    try:
        mix = await lease_members(service, members, mixing, admission, "members")
        await mix.uses()
    finally:
        admission.release()


def mixture_body(mixture: Alias) -> dict[str, Any]:
    """As the contract writes one."""
    assert mixture.mixing is not None
    members = [target.reference for target in mixture.targets]
    return {"object": "mixture", "name": mixture.alias, "members": members, **mixture.mixing._asdict()}


def _trace_body(service: Service, name: str, traced: TracedPrompt) -> bytes:
    """Module by module, so that nobody waits long for the interpreter meanwhile."""
    pieces = service.base.vocabulary.pieces(traced.token_ids)
    told = {
        "object": "mixture.trace",
        "name": name,
        "members": [f"{record.name}@{record.version}" for record in traced.records],
        "tokens": [{"id": id_, "text": text} for id_, text in zip(traced.token_ids, pieces, strict=True)],
    }
    modules = ",".join(json.dumps(choices._asdict()) for choices in traced.choices())
    return f'{json.dumps(told)[:-1]}, "modules": [{modules}]}}'.encode()
