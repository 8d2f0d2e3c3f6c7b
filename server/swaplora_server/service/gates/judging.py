"""Candidates, judged one after the other: asked the tasks of their gate beside the current version, behind all else.

What is to be judged is seen in the registry, whatever way it came in, and again after a restart. A judgement that is no
more of the gate, the version and the current version that there are is let go of, and made anew.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import structlog

from swaplora_adapters.errors import AdapterError
from swaplora_adapters.files.naming import DEFAULT_TENANT, tenant_of
from swaplora_adapters.registry.index import NamedVersions
from swaplora_adapters.registry.names import Judgement
from swaplora_adapters.registry.naming import Naming
from swaplora_server.access.caller import Caller, KeyScope
from swaplora_server.evaluation.gate import Gate, GateTask, Rate, reason_of
from swaplora_server.evaluation.results import SCORE
from swaplora_server.evaluation.task import Task, TaskError
from swaplora_server.service.errors import RequestError
from swaplora_server.service.evaluations.asking import Asking
from swaplora_server.service.evaluations.record import Evaluation, State
from swaplora_server.service.evaluations.running import begin, cancel, forget
from swaplora_server.service.gates.gates import MAX_TASK_BYTES
from swaplora_server.service.service import Service
from swaplora_server.service.tenant import TenantService

KEY_ID = "gate"  # in the audit log, in place of a key
LOOK_SECONDS = 0.5
AGAIN_SECONDS = 30.0  # after what went wrong on the way to a judgement
_log = structlog.get_logger(__name__)


class Due(NamedTuple):
    """A candidate, and what it is to be judged by."""

    name: str  # as it is stored
    version: int
    digest: str
    gate: str
    against: int


class _CannotJudgeError(Exception):
    """The message says why, for the candidate's verdict."""


class _EndedError(Exception):
    """The server stops."""


@asynccontextmanager
async def judged(service: Service) -> AsyncIterator[None]:
    """While this is open candidates are judged; `service` may still be starting."""
    watch = asyncio.create_task(_Judges(service).watch())
    try:
        yield
    finally:
        watch.cancel()
        await asyncio.wait({watch})


class _Judges:
    """One of each tenant at a time, its oldest candidate but of each name the newest first."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._runs: dict[str, tuple[Due, asyncio.Task[None]]] = {}  # by tenant
        self._not_before: dict[Due, float] = {}

    async def watch(self) -> None:
        try:
            while True:
                if self._service.is_ready and self._service.generates:
                    self._look()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for _, run in self._runs.values():
                run.cancel()

    def _look(self) -> None:
        gated, now = self._service.registry.names.index.gated(), time.monotonic()
        waiting = [each for named in gated for each in _due_of(named)]
        self._not_before = {due: at for due, at in self._not_before.items() if due in waiting and at > now}
        for due, run in self._runs.values():
            if due not in waiting:
                run.cancel()  # gate, current version or candidate are others now
        newest: dict[str, Due] = {}
        for due in waiting:
            if due not in self._not_before:
                newest.setdefault(due.name, due)
        for due in newest.values():
            tenant = tenant_of(due.name)
            if tenant not in self._runs:
                run = asyncio.create_task(self._judge(due))
                self._runs[tenant] = due, run
                run.add_done_callback(partial(self._forget, tenant))

    def _forget(self, tenant: str, _run: object) -> None:
        self._runs.pop(tenant, None)

    async def _judge(self, due: Due) -> None:
        """The one place where the way to a judgement ends, whatever ends it."""
        structlog.contextvars.bind_contextvars(request_id=f"gate of {due.name}")
        caller = _caller(self._service, tenant_of(due.name))
        try:
            verdict = await _verdict(self._service, caller, due)
            found = Judgement(due.gate, due.version, due.against, verdict["reason"] is None, verdict)
            card = await asyncio.to_thread(self._service.registry.judge, due.name, found)
            if card is not None:
                change = "gate.pass" if found.has_passed else "gate.fail"
                name = Naming(tenant_of(due.name)).said(due.name)
                self._service.audit.write(caller, "", change, name, due.version, due.digest, "done")
                _log.info(change, adapter=due.name, version=due.version, reason=verdict["reason"])
        except _EndedError:
            return
        except (RequestError, AdapterError) as error:
            _log.warning("a candidate cannot be judged yet", adapter=due.name, reason=str(error))
            self._not_before[due] = time.monotonic() + AGAIN_SECONDS
        except Exception as error:  # noqa: BLE001 - nobody waits for it who could be told otherwise
            _log.exception("judging a candidate failed", adapter=due.name, error=repr(error))
            self._not_before[due] = time.monotonic() + AGAIN_SECONDS


def _due_of(named: NamedVersions) -> list[Due]:
    current = named.current
    return [Due(current.name, r.version, r.digest, named.gate or "", current.version) for r in named.candidates]


def _caller(service: Service, tenant: str) -> Caller:
    """Its tokens count as the tenant's; no key is behind it."""
    name = tenant or DEFAULT_TENANT
    limits = service.keys.tenant_limits(name)
    return Caller(KEY_ID, name, frozenset({KeyScope.GENERATE}), tenant_limits=limits)


async def _verdict(service: Service, caller: Caller, due: Due) -> dict[str, Any]:
    """What is kept of it: `reason` is None if all bars are met."""
    gate = Gate.model_validate_json(due.gate)
    told: dict[str, Any] = {"against": due.against, "bars": [], "evaluations": []}
    scores = []
    try:
        for task in gate.tasks:
            evaluation = await _asked(TenantService(service, caller, ""), due, gate, task)
            told["evaluations"].append(evaluation.id)
            scores.append(_scores(evaluation))
    except _CannotJudgeError as error:
        return told | {"at": time.time(), "reason": str(error)}
    told["bars"] = gate.bars(scores)
    return told | {"at": time.time(), "reason": reason_of(told["bars"])}


async def _asked(service: Service, due: Due, gate: Gate, wanted: GateTask) -> Evaluation:
    """One task, asked of the candidate and of the current version."""
    task = await _task(service, wanted)
    for old in service.evaluations.surplus(service.tenant):
        await forget(service, old)
    name = Naming(service.tenant).said(due.name)
    asking = Asking(gate.max_tokens, tuple(gate.stop), f"{service.tenant}\0" if service.tenant else None)
    models = [f"{name}@{due.version}", f"{name}@{due.against}"]
    evaluation = await begin(service, task, models, asking, gate=name)
    try:
        if run := service.evaluations.runs.get(evaluation.id):
            await asyncio.wait({run})
    finally:
        if evaluation.is_open:
            await cancel(service, evaluation)
    if evaluation.state is State.INTERRUPTED:
        raise _EndedError
    if evaluation.state is not State.DONE:
        why = evaluation.error.message if evaluation.error else "its evaluation was cancelled"
        raise _CannotJudgeError(f"it could not be judged: {why}; set the gate again to have it tried again")
    return evaluation


async def _task(service: Service, wanted: GateTask) -> Task:
    read = partial(service.gil_turns.do, partial(service.gates.files.read, wanted.digest))
    try:
        return await service.offload.do(MAX_TASK_BYTES, read)
    except TaskError as error:
        raise _CannotJudgeError(f"{error}: set the gate again") from error


def _scores(evaluation: Evaluation) -> tuple[Rate, Rate]:
    """The candidate's, and the current version's."""
    results: list[Mapping[str, Any]] = evaluation.told_whole()["results"]
    new, current = (result["metrics"][SCORE] for result in results)
    return new, current
