"""/v1/adapters/{name}/gate: what new versions must show before they are current."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from swaplora_adapters.registry.card import Card
from swaplora_server.access.caller import KeyScope
from swaplora_server.evaluation.gate import Gate, GateTask, MustKeep
from swaplora_server.evaluation.task import Task, TaskError, parse_task
from swaplora_server.http.auth import needs
from swaplora_server.http.cards import judged_versions
from swaplora_server.http.dependencies import Serving, refuse_unknown_parameters
from swaplora_server.http.described import OBJECT, OBJECTS, REAL, TEXT, answers, object_of
from swaplora_server.http.evaluations.gate_wire import GateBody
from swaplora_server.http.evaluations.wire import TaskText
from swaplora_server.http.transport.body import body_schema, json_body
from swaplora_server.http.transport.body_memory import account_of
from swaplora_server.service.errors import RequestError
from swaplora_server.service.gates.gates import MAX_TASK_BYTES, gate_of
from swaplora_server.service.service import Service

router = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])
_GATE = object_of(object=TEXT, name=TEXT, task=OBJECT, min_score=REAL, versions=OBJECTS)


@router.put("/v1/adapters/{name}/gate", openapi_extra=body_schema(GateBody), responses=answers(_GATE, 200))
@needs(KeyScope.WRITE)
async def put_gate(
    request: Request, service: Serving, name: str, body: Annotated[GateBody, Depends(json_body(GateBody))]
) -> dict[str, Any]:
    """From now on a new version is current only once it has passed; durable when this answers.

    What the name stands for stays, and versions that an earlier gate has held back are judged anew.
    """
    service.check_serving()
    service.check_generating()
    task = await _task(request, service, body.task, "task")
    kept = None if body.must_keep is None else await _task(request, service, body.must_keep.task, "must_keep.task")
    gate = Gate(
        task=GateTask(digest=task.digest, num_items=len(task.items)),
        min_score=body.min_score,
        must_keep=kept
        and body.must_keep
        and MustKeep(digest=kept.digest, num_items=len(kept.items), max_drop=body.must_keep.max_drop),
        max_tokens=body.max_tokens,
        stop=body.stop,
    )
    card = await service.gates.put(service.registry, name, gate, [task] if kept is None else [task, kept])
    return _told(name, gate, card)


@router.get("/v1/adapters/{name}/gate", responses=answers(_GATE, 200))
@needs(KeyScope.READ)
async def get_gate(service: Serving, name: str) -> dict[str, Any]:
    """What it asks for, and what each version has shown."""
    service.check_serving()
    return _told(name, gate_of(service.registry, name), service.registry.card(name))


@router.delete("/v1/adapters/{name}/gate", responses=answers(object_of(object=TEXT, name=TEXT), 200))
@needs(KeyScope.WRITE)
async def delete_gate(service: Serving, name: str) -> dict[str, Any]:
    """From now on a new version is current at once. Those that were held back stay what they are until made current."""
    service.check_serving()
    await service.gates.remove(service.registry, name)
    return {"object": "gate.deleted", "name": name}


async def _task(request: Request, service: Service, given: TaskText, param: str) -> Task:
    """Raises RequestError, with `param` for the field."""
    parse = partial(service.gil_turns.do, partial(_bounded, given))
    try:
        return await service.offload.do(account_of(request.scope).num_bytes, parse)
    except TaskError as error:
        raise RequestError("invalid_request", f"{param}: {error}", param) from error


def _bounded(given: TaskText) -> Task:
    task = parse_task(given)
    if sum(len(item.canonical.encode()) + 1 for item in task.items) > MAX_TASK_BYTES:
        raise TaskError(f"a gate's task may have {MAX_TASK_BYTES} bytes")
    return task


def _told(name: str, gate: Gate, card: Card) -> dict[str, Any]:
    told = {"object": "gate", "name": name, **gate.told(), "current": card.record.version}
    return told | {"versions": judged_versions(card)}
