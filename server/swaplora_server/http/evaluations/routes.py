"""/v1/evaluations: begin, list, watch, cancel and delete runs of a task."""

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse

from swaplora_server.access.caller import KeyScope
from swaplora_server.evaluation.task import TaskError, parse_task
from swaplora_server.http.auth import caller_of, needs
from swaplora_server.http.dependencies import Serving, refuse_unknown_parameters, request_id
from swaplora_server.http.described import OBJECT, OBJECTS, TEXT, answers, object_of
from swaplora_server.http.evaluations.wire import EvaluationBody
from swaplora_server.http.tasks import salt_of
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.transport.body_memory import account_of
from swaplora_server.service.errors import RequestError
from swaplora_server.service.evaluations.asking import Asking
from swaplora_server.service.evaluations.record import Evaluation
from swaplora_server.service.evaluations.running import begin, cancel, forget
from swaplora_server.service.service import Service

router = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])
_SHOWN = {"object": TEXT, "id": TEXT, "state": TEXT, "task": OBJECT, "models": OBJECTS, "progress": OBJECT}
_WHOLE = object_of(**_SHOWN, results=OBJECTS, comparisons=OBJECTS)


def _check_room(service: Serving) -> None:
    """A dependency that comes before the body: what there is no room for is not read."""
    service.check_serving()
    service.evaluations.check_room(service.tenant)


@router.post(
    "/v1/evaluations",
    status_code=201,
    dependencies=[Depends(_check_room)],
    openapi_extra=body_schema(EvaluationBody),
    responses=answers(_WHOLE, 201),
)
@needs(KeyScope.GENERATE)
async def begin_evaluation(
    request: Request, service: Serving, body: Annotated[EvaluationBody, Depends(json_body(EvaluationBody))]
) -> JSONResponse:
    """Ask a task of models: 201 once it is wanted for good; it runs behind all other requests."""
    try:
        parse = partial(service.gil_turns.do, partial(parse_task, body.task))
        task = await service.offload.do(account_of(request.scope).num_bytes, parse)
    except TaskError as error:
        raise RequestError("invalid_request", f"task: {error}", "task") from error
    asking = Asking(body.max_tokens, tuple(body.stop), salt_of(request, None))
    evaluation = await begin(service, task, body.models, asking)
    await _note(request, service, "evaluation.create", evaluation)
    return JSONResponse(await _whole(service, evaluation), 201)


@router.get("/v1/evaluations", responses=answers(object_of(object=TEXT, data=OBJECTS), 200))
@needs(KeyScope.GENERATE)
async def list_evaluations(
    service: Serving,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """The newest first, `limit` of them from the one behind `after` on; without results."""
    service.check_serving()
    found = service.evaluations.of(service.tenant)
    if after is not None:
        found = found[found.index(service.evaluations.get(service.tenant, after)) + 1 :]
    return {"object": "list", "data": [one.told() for one in found[:limit]], "has_more": len(found) > limit}


@router.get("/v1/evaluations/{evaluation_id}", responses=answers(_WHOLE, 200))
@needs(KeyScope.GENERATE)
async def get_evaluation(service: Serving, evaluation_id: str) -> dict[str, Any]:
    """How far it is, and its results as far as they are there."""
    service.check_serving()
    return await _whole(service, service.evaluations.get(service.tenant, evaluation_id))


@router.post("/v1/evaluations/{evaluation_id}/cancel", responses=answers(_WHOLE, 200))
@needs(KeyScope.GENERATE)
async def cancel_evaluation(request: Request, service: Serving, evaluation_id: str) -> dict[str, Any]:
    """End it, and keep what has come; one that has ended stays as it is."""
    evaluation = _to_end(request, service, evaluation_id)
    await cancel(service, evaluation)
    await _note(request, service, "evaluation.cancel", evaluation)
    return await _whole(service, evaluation)


@router.delete("/v1/evaluations/{evaluation_id}", responses=answers(object_of(object=TEXT, id=TEXT), 200))
@needs(KeyScope.GENERATE)
async def delete_evaluation(request: Request, service: Serving, evaluation_id: str) -> dict[str, Any]:
    """End it, and keep nothing of it."""
    evaluation = _to_end(request, service, evaluation_id)
    await forget(service, evaluation)
    await _note(request, service, "evaluation.delete", evaluation)
    return {"object": "evaluation.deleted", "id": evaluation.id}


async def _whole(service: Service, evaluation: Evaluation) -> dict[str, Any]:
    """Counted off the event loop: there may be many scores."""
    return await asyncio.to_thread(service.evaluations.whole, evaluation)


def _to_end(request: Request, service: Service, evaluation_id: str) -> Evaluation:
    """Raises RequestError for what is not there, and where a gate asks and the key may not change what that judges."""
    service.check_serving()
    evaluation = service.evaluations.get(service.tenant, evaluation_id)
    if evaluation.gate is not None and not caller_of(request).may({KeyScope.WRITE}):
        message = f"the gate of {evaluation.gate} asks this: it needs a key with the scope {KeyScope.WRITE}"
        raise RequestError("insufficient_scope", message)
    return evaluation


async def _note(request: Request, service: Service, change: str, evaluation: Evaluation) -> None:
    write = partial(service.audit.write, caller_of(request), request_id(), change, evaluation.id)
    await asyncio.to_thread(write, None, evaluation.task_digest, "done")
