"""An evaluation from its beginning to its end: bound to versions, asked item by item, cancelled, forgotten."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from contextvars import Context
from functools import partial

import structlog

from swaplora_adapters.errors import AdapterError, AdapterNotFoundError
from swaplora_server.evaluation.task import Item, Task
from swaplora_server.service.adapter_mix import bound_mixture
from swaplora_server.service.errors import RequestError
from swaplora_server.service.evaluations.asking import Asking, scores_of
from swaplora_server.service.evaluations.evaluations import NUM_AT_ONCE
from swaplora_server.service.evaluations.record import (
    ENDED_FIRST,
    Evaluated,
    Evaluation,
    Failure,
    Mixture,
    State,
    Version,
)
from swaplora_server.service.service import Service

MAX_ANSWERS = 20_000  # of items times models
SAVE_SECONDS = 10.0
BLOCK_ITEMS = 50  # asked of a model before the next: adapters that do not fit together are loaded once for so many
_STOPPED = frozenset({"draining", "not_ready", "engine_failed"})
_log = structlog.get_logger(__name__)


class _CannotAskError(RequestError):
    """One item could not be asked of one model."""

    def __init__(self, code: str, message: str, model: str) -> None:
        super().__init__(code, message)
        self.model = model


async def begin(
    service: Service, task: Task, models: Sequence[str], asking: Asking, gate: str | None = None
) -> Evaluation:
    """Bind the names to versions and have the task asked of them; when this returns, that it was wanted is durable.

    The versions stay until it has ended, unless they are deleted. `gate` is the adapter whose gate asks. Raises
    RequestError and AdapterError.
    """
    service.check_serving()
    service.check_generating()
    if (num := len(task.items) * len(models)) > MAX_ANSWERS:
        message = f"the task's items times the models are {num}, and an evaluation has at most {MAX_ANSWERS} answers"
        raise RequestError("invalid_request", message, "models")
    evaluation = Evaluation(
        tenant=service.tenant,
        task_digest=task.digest,
        num_items=len(task.items),
        kinds=[item.kind for item in task.items],
        max_tokens=asking.max_tokens,
        stop=list(asking.stop),
        fingerprint=service.fingerprint,
        models=_bound(service, models),
        scores=[[None] * len(task.items) for _ in models],
        gate=gate,
    )
    service.evaluations.admit(evaluation)
    with ExitStack() as held:
        try:
            for one in evaluation.models:
                for version in one.kept:
                    held.callback(service.registry.keep(version).release)
            await asyncio.to_thread(service.evaluations.save, evaluation)
        except BaseException:
            await asyncio.to_thread(service.evaluations.forget, evaluation)
            raise
        if not evaluation.is_open:
            return evaluation  # it was cancelled meanwhile
        run = asyncio.create_task(_run(service, evaluation, task.items, asking), context=Context())
        service.evaluations.runs[evaluation.id] = run
        run.add_done_callback(lambda _done: service.evaluations.runs.pop(evaluation.id, None))
        run.add_done_callback(partial(_let_go, held.pop_all()))
    return evaluation


async def cancel(service: Service, evaluation: Evaluation) -> None:
    """End it, and keep what has come; one that has ended stays as it is."""
    if not evaluation.is_open:
        return
    evaluation.end(State.CANCELLED)
    if run := service.evaluations.runs.get(evaluation.id):
        run.cancel()
        await asyncio.wait({run})
    await asyncio.to_thread(service.evaluations.save, evaluation)


async def forget(service: Service, evaluation: Evaluation) -> None:
    """End it, and keep nothing of it."""
    await cancel(service, evaluation)
    await asyncio.to_thread(service.evaluations.forget, evaluation)


def _let_go(held: ExitStack, _run: object) -> None:
    held.close()


def _bound(service: Service, models: Sequence[str]) -> list[Evaluated]:
    bound: list[Evaluated] = []
    for number, model in enumerate(models):
        one = _evaluated(service, model, f"models[{number}]")
        if any(one.model_copy(update={"model": other.model}) == other for other in bound):
            raise RequestError("invalid_request", f"models[{number}] was listed before", f"models[{number}]")
        bound.append(one)
    return bound


def _evaluated(service: Service, model: str, param: str) -> Evaluated:
    if service.is_base(model):
        return Evaluated(model=model)
    reference = service.reference(model).removeprefix("base:")
    try:
        if (mixture := bound_mixture(service, reference)) is not None:
            members = [_version(service, member) for member in mixture.members]
            bound = Mixture(members=members, **mixture.mixing._asdict())
            return Evaluated(model=model, digest=bound.digest, mixture=bound)
        return Evaluated(model=model, **_version(service, reference).model_dump())
    except AdapterNotFoundError as error:
        message = (
            f"there is no adapter {model[:128]!r}, or it is a mixture that has lost a member; name the base, adapters, "
            "versions of them or mixtures, but no alias"
        )
        raise RequestError("model_not_found", message, param) from error


def _version(service: Service, reference: str) -> Version:
    record = service.registry.names.index.resolve_name(reference)
    return Version(name=record.name, version=record.version, digest=record.digest)


async def _run(service: Service, evaluation: Evaluation, items: Sequence[Item], asking: Asking) -> None:
    """The one place where an evaluation ends by itself, whatever ends it."""
    structlog.contextvars.bind_contextvars(request_id=evaluation.id)
    evaluations = service.evaluations
    try:
        async with evaluations.turns[evaluation.tenant]:
            if evaluation.is_open:
                evaluation.state = State.RUNNING
                await _ask_all(service, evaluation, items, asking)
        evaluation.end(State.DONE)
    except asyncio.CancelledError:
        evaluation.end(State.INTERRUPTED, ENDED_FIRST)  # unless it was cancelled by who wanted it
        raise
    except (RequestError, AdapterError) as error:
        is_stopped, model = error.code in _STOPPED, error.model if isinstance(error, _CannotAskError) else None
        failure = Failure(code=error.code, message=str(error), model=model)
        evaluation.end(State.INTERRUPTED if is_stopped else State.FAILED, failure)
    except Exception as error:  # noqa: BLE001 - nobody waits for it who could be told otherwise
        _log.exception("an evaluation failed", evaluation=evaluation.id, error=repr(error))
        message = "the server made a mistake; its log says more under the evaluation's id"
        evaluation.end(State.FAILED, Failure(code="internal_error", message=message))
    finally:
        await asyncio.to_thread(evaluations.save_if_possible, evaluation)


async def _ask_all(service: Service, evaluation: Evaluation, items: Sequence[Item], asking: Asking) -> None:
    """Some items of one model and then of the next, so that they can be compared early. Raises the first error."""
    work = _work(service, evaluation)
    askers = [asyncio.create_task(_ask_some(service, evaluation, items, asking, work)) for _ in range(NUM_AT_ONCE)]
    saving = asyncio.create_task(_save_at_times(service, evaluation))
    try:
        await asyncio.gather(*askers)
    finally:
        for each in (*askers, saving):
            each.cancel()
        await asyncio.wait({*askers, saving})


def _work(service: Service, evaluation: Evaluation) -> Iterator[tuple[int, int]]:
    """Items and models, by their numbers. Raises RequestError, and has it cancelled, once its key is no longer good."""
    for start in range(0, evaluation.num_items, BLOCK_ITEMS):
        for model in range(len(evaluation.models)):
            if evaluation.gate is None and not service.is_key_good:
                message = "the key that began it has expired, was revoked, or may not generate any more"
                evaluation.end(State.CANCELLED, Failure(code="invalid_api_key", message=message))
                raise RequestError("invalid_api_key", message)
            yield from ((number, model) for number in range(start, min(start + BLOCK_ITEMS, evaluation.num_items)))


async def _ask_some(
    service: Service, evaluation: Evaluation, items: Sequence[Item], asking: Asking, work: Iterator[tuple[int, int]]
) -> None:
    for number, model in work:
        bound = evaluation.models[model]
        try:
            scores = await scores_of(service, asking, bound, items[number])
        except (RequestError, AdapterError) as error:
            message = f"item {number + 1}, asked of {bound.reference}: {error}"
            raise _CannotAskError(error.code, message, bound.model) from error
        evaluation.note(model, number, scores)


async def _save_at_times(service: Service, evaluation: Evaluation) -> None:
    """So that not all is lost with a process that is killed."""
    while True:
        await asyncio.sleep(SAVE_SECONDS)
        await asyncio.to_thread(service.evaluations.save_if_possible, evaluation)
