"""Candidates, judged one after the other: asked the tasks of their gate beside the current version, behind all else.

What is to be judged is seen in the registry, whatever way it came in, and again after a restart. A judgement that is no
more of the gate, the version and the current version that there are is let go of, and made anew.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import structlog

from swaplora_adapters.errors import AdapterError
from swaplora_adapters.files.naming import DEFAULT_TENANT, tenant_of
from swaplora_adapters.registry.index import NamedVersions
from swaplora_adapters.registry.names import Judgement
from swaplora_adapters.registry.naming import Naming
from swaplora_adapters.store.shared.extras import CLAIM_SECONDS
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
AGAIN_SECONDS = 30.0  # after what went wrong on the way to a judgement, and twice as long each time
MAX_AGAIN_SECONDS = 3600.0
WRITE_SECONDS = 3.0  # that an end waits for what is judged and not written: then it is judged anew
# an evaluation that ended so says something of its task or of what was asked; all else is the server's
_VERDICTS = frozenset(
    {
        "invalid_request",
        "unsupported_field",
        "context_length_exceeded",
        "adapter_failed",
        "adapter_too_large",
        "invalid_adapter",
        "unsupported_adapter",
    }
)
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


class _NotYetError(Exception):
    """What went wrong says nothing of the candidate, and may be over when it is tried again."""


class _NoCurrentError(Exception):
    """The current version cannot be asked; the message says why."""


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
    """One of each tenant at a time: of each name the newest candidate, and the name that has waited longest."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._runs: dict[str, tuple[Due, asyncio.Task[None]]] = {}  # by tenant
        self._tries: dict[Due, tuple[int, float]] = {}  # how many failed, and when the next may be
        self._last: dict[str, float] = {}  # when each name had its turn
        self._found: dict[Due, Judgement] = {}  # what is yet to be written

    async def watch(self) -> None:
        try:
            while True:
                if self._service.is_ready and self._service.generates:
                    try:
                        self._look()
                        await self._service.gates.sweep()
                    except Exception as error:  # noqa: BLE001 - or no candidate would be judged any more
                        _log.exception("looking for candidates failed", error=repr(error))
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            runs = [*self._runs.values()]
            for due, run in runs:
                if due not in self._found:
                    run.cancel()
            if writing := {run for due, run in runs if due in self._found}:
                await asyncio.wait(writing, timeout=WRITE_SECONDS)

    def _look(self) -> None:
        gated, now = self._service.registry.names.index.gated(), time.monotonic()
        waiting = {due: created for named in gated for due, created in _due_of(named)}
        names = {named.current.name for named in gated}
        self._tries = {due: tries for due, tries in self._tries.items() if due in waiting}
        self._last = {name: at for name, at in self._last.items() if name in names}
        for due, run in self._runs.values():
            if due not in waiting and due not in self._found:
                run.cancel()  # gate, current version or candidate are others now
        running = {due for due, _ in self._runs.values()}
        self._found = {due: found for due, found in self._found.items() if due in waiting or due in running}
        newest: dict[str, Due] = {}
        for due in waiting:
            if tenant_of(due.name) not in self._runs and self._tries.get(due, (0, 0.0))[1] <= now:
                newest.setdefault(due.name, due)
        for due in sorted(newest.values(), key=lambda due: (self._last.get(due.name, 0.0), waiting[due])):
            tenant = tenant_of(due.name)
            if tenant not in self._runs and self._service.keys.has_tenant(tenant or DEFAULT_TENANT):
                self._last[due.name] = now
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
            if due not in self._found:
                if not await self._service.change(partial(_is_ours, self._service, due)):
                    self._tries[due] = 0, time.monotonic() + AGAIN_SECONDS
                    return
                async with _held(self._service, due):
                    verdict = await _verdict(self._service, caller, due)
                found = Judgement(due.gate, due.version, due.against, verdict["reason"] is None, verdict)
                self._found[due] = found  # from here on nobody cancels this, and a full disk has the write alone again
            await self._service.change(partial(_note, self._service, caller, due, self._found[due]))
            del self._found[due]
            with suppress(AdapterError):  # it is judged all the same
                await self._service.change(partial(_let_go, self._service, due))
        except _EndedError:
            return
        except (RequestError, AdapterError, _NotYetError) as error:
            _log.warning("a candidate cannot be judged yet", adapter=due.name, reason=str(error))
            self._try_again(due)
        except Exception as error:  # noqa: BLE001 - nobody waits for it who could be told otherwise
            _log.exception("judging a candidate failed", adapter=due.name, error=repr(error))
            self._try_again(due)

    def _try_again(self, due: Due) -> None:
        """The judgement that is there is to be written soon; one that has to be made anew costs more each time."""
        num = 0 if due in self._found else self._tries.get(due, (0, 0.0))[0]
        self._tries[due] = num + 1, time.monotonic() + min(AGAIN_SECONDS * 2**num, MAX_AGAIN_SECONDS)


def _due_of(named: NamedVersions) -> list[tuple[Due, float]]:
    """Each with the moment when it came, newest first."""
    name, gate, against = named.current.name, named.gate or "", named.current.version
    return [(Due(name, r.version, r.digest, gate, against), r.created) for r in named.candidates]


def _is_ours(service: Service, due: Due) -> bool:
    """Whether it is not another server that judges it, of those that share names."""
    extras = service.registry.extras
    return extras is None or extras.claim(_claimed(due))


def _let_go(service: Service, due: Due) -> None:
    """It is judged."""
    if (extras := service.registry.extras) is not None:
        extras.let_go(_claimed(due))


def _claimed(due: Due) -> str:
    return hashlib.sha256(repr(due).encode()).hexdigest()


@asynccontextmanager
async def _held(service: Service, due: Due) -> AsyncIterator[None]:
    """However long the body takes, no other server begins with it."""

    async def hold() -> None:
        while True:
            await asyncio.sleep(CLAIM_SECONDS)
            with suppress(AdapterError):  # it is asked again
                await service.change(partial(_is_ours, service, due))

    holding = asyncio.create_task(hold())
    try:
        yield
    finally:
        holding.cancel()


def _note(service: Service, caller: Caller, due: Due, found: Judgement) -> None:
    """The judgement and its line in the audit log, on one thread: neither comes without the other."""
    if service.registry.judge(due.name, found) is None:
        return
    change = "gate.pass" if found.has_passed else "gate.fail"
    name = Naming(tenant_of(due.name)).said(due.name)
    service.audit.write(caller, "", change, name, due.version, due.digest, "done")
    _log.info(change, adapter=due.name, version=due.version, reason=found.verdict["reason"])


def _caller(service: Service, tenant: str) -> Caller:
    """Its tokens count as the tenant's; no key is behind it."""
    name = tenant or DEFAULT_TENANT
    limits = service.keys.tenant_limits(name)
    return Caller(KEY_ID, name, frozenset({KeyScope.GENERATE}), tenant_limits=limits)


async def _verdict(service: Service, caller: Caller, due: Due) -> dict[str, Any]:
    """What is kept of it: `reason` is None if all bars are met."""
    gate = Gate.model_validate_json(due.gate)
    told: dict[str, Any] = {"against": due.against, "bars": [], "evaluations": [], "without_current": None}
    of_tenant = TenantService(service, caller, "")
    scores: list[tuple[Rate, Rate | None]] = []
    try:
        for task in gate.tasks:
            try:
                evaluation = await _asked(of_tenant, due, gate, task, (due.version, due.against))
            except _NoCurrentError as error:
                told["without_current"] = str(error)
                if scores:
                    break  # what must be kept is nothing without it
                evaluation = await _asked(of_tenant, due, gate, task, (due.version,))
            told["evaluations"].append(evaluation.id)
            scores.append(_scores(evaluation))
            if told["without_current"] is not None:
                break
    except _CannotJudgeError as error:
        return told | {"at": time.time(), "reason": str(error)}
    told["bars"] = gate.bars(scores)
    return told | {"at": time.time(), "reason": reason_of(told["bars"])}


async def _asked(service: Service, due: Due, gate: Gate, wanted: GateTask, versions: Sequence[int]) -> Evaluation:
    """One task, asked of the candidate and of the current version, or of the candidate alone."""
    task = await _task(service, wanted)
    for old in service.evaluations.surplus(service.tenant):
        await forget(service, old)
    name = Naming(service.tenant).said(due.name)
    asking = Asking(gate.max_tokens, tuple(gate.stop), f"{service.tenant}\0" if service.tenant else None)
    models = [f"{name}@{version}" for version in versions]
    evaluation = await begin(service, task, models, asking, gate=name)
    try:
        if run := service.evaluations.runs.get(evaluation.id):
            await asyncio.wait({run})
    finally:
        if evaluation.is_open:
            await cancel(service, evaluation)
    if evaluation.state is State.INTERRUPTED:
        raise _EndedError
    if evaluation.state is State.DONE:
        return evaluation
    if (error := evaluation.error) is None or error.code not in _VERDICTS:
        raise _NotYetError(error.message if error else "its evaluation was cancelled")
    if error.code == "adapter_failed" and error.model in models[1:]:
        raise _NoCurrentError(error.message)
    raise _CannotJudgeError(f"it could not be judged: {error.message}; set the gate again to have it tried again")


async def _task(service: Service, wanted: GateTask) -> Task:
    files = service.gates.files
    read = partial(service.gil_turns.do, partial(files.read, wanted.digest))
    try:
        await service.change(partial(files.bring, wanted.digest))  # which may wait for long
        try:
            return await service.offload.do(MAX_TASK_BYTES, read)
        except TaskError:  # the copy here is damaged, and perhaps no other
            await service.change(partial(files.bring_anew, wanted.digest))
            return await service.offload.do(MAX_TASK_BYTES, read)
    except TaskError as error:
        raise _CannotJudgeError(f"{error}: set the gate again") from error


def _scores(evaluation: Evaluation) -> tuple[Rate, Rate | None]:
    """The candidate's, and the current version's if that was asked."""
    results: list[Mapping[str, Any]] = evaluation.told_whole()["results"]
    new, *current = (result["metrics"][SCORE] for result in results)
    return new, next(iter(current), None)
