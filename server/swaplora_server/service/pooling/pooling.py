"""One request for vectors: its inputs go to the engine a few at a time, beside all others, and come back in order."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from swaplora_adapters.files.naming import DEFAULT_TENANT
from swaplora_adapters.store.records import VersionRecord
from swaplora_server.access.limits import NOTHING, Reservation
from swaplora_server.engine.pooling.kinds import Reader
from swaplora_server.engine.request import AdapterUse, FinishReason, Request, SamplingParams, TokenEvent, Vector
from swaplora_server.log_lines import notes
from swaplora_server.service.adapter_mix import (
    NOBODY,
    AdapterMix,
    Asker,
    MixTerm,
    awaited_uses,
    invoked_at,
    lease_mix,
    wanted_by,
)
from swaplora_server.service.admission import NO_HURRY, Admission, Urgency
from swaplora_server.service.errors import RequestError
from swaplora_server.service.metrics.records import Outcome, PoolingRecord
from swaplora_server.service.pooling.inputs import Encoded, Input, Reading
from swaplora_server.service.service import Service
from swaplora_server.service.tracing.tracing import Asked
from swaplora_server.service.wakeups import in_time

_NOTHING_GENERATED = SamplingParams(max_tokens=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingTask:
    """What one request wants: a vector of each of its inputs, by the base or by adapters."""

    model: str
    encode: Callable[[], Awaitable[Encoded]]
    param: str  # the field that has the texts
    num_at_once: int  # inputs that it has with the engine at once, if the engine has room for so many
    operation: str = "embeddings"  # or another, for traces
    adapters: tuple[MixTerm, ...] = ()  # added to the base, which is then the model
    cache_salt: str | None = None
    urgency: Urgency = NO_HURRY
    asker: Asker = NOBODY


@dataclass(frozen=True, slots=True)
class Pooled:
    """What came of it: what was read of each input, in their order; an embedding is [hidden_size]."""

    vectors: Sequence[Vector]
    reader: Reader
    uses: Sequence[AdapterUse]  # who answered; none for the base
    records: Sequence[VersionRecord]  # the versions that answer; of a sum all, in order; none for the base
    num_prompt_tokens: int
    num_cached_tokens: int


async def pool(service: Service, task: PoolingTask) -> Pooled:
    """Make and check the inputs, bind the names of who answers to versions, and have all inputs computed.

    Raises RequestError, and AdapterError for an adapter that cannot be had. Whoever is cancelled leaves nothing behind.
    """
    began = time.monotonic()
    service.check_serving()
    width = min(task.num_at_once, service.max_rows)
    wanted = wanted_by(service, task.model, task.adapters)
    admission, reservation = service.admissions.admit(width, service.tenant, wanted, service.peer), NOTHING
    try:
        async with in_time(task.urgency.deadline(began)):
            encoded = await task.encode()
            service.check_serving()
            reservation = await service.reserve_tokens(encoded.most_tokens, task.param)
            mix = await lease_mix(service, task.model, task.adapters, task.asker, admission)
            asked_at = time.monotonic()
            uses = await awaited_uses(service, mix, task.urgency)
            seconds = time.monotonic() - asked_at
        reading = encoded.reading(uses)
        starts = await _starts(reading.inputs, uses)
    except BaseException:
        reservation.settle(0)
        admission.release(has_run=False)
        raise
    pooling = _Pooling(service, task, reading, mix, began, seconds, reservation)
    return await pooling.run(uses, starts, admission, width)


async def _starts(inputs: Sequence[Input], uses: Sequence[AdapterUse]) -> Sequence[int]:
    """Of each input the token that its adapter applies to first. Raises RequestError for one without the invocation."""
    if not any(use.weights.invocation for use in uses):
        return [0] * len(inputs)
    starts = []
    for one in inputs:
        starts.append(invoked_at(one.filled().token_ids, uses, one.param))
        await asyncio.sleep(0)  # many long ones, made and looked through, would hold the event loop
    return starts


class _Pooling:
    """The inputs of one request on their way. Lives on the event loop; the engine posts ends to it."""

    def __init__(
        self,
        service: Service,
        task: PoolingTask,
        reading: Reading,
        mix: AdapterMix,
        began: float,
        seconds_for_adapters: float,
        reservation: Reservation,
    ) -> None:
        """`began` is the moment, on the monotonic clock, at which the client's wait began."""
        self._service = service
        self._task = task
        self._reads, self._inputs = reading
        self._records = mix.records
        self._mix = mix
        self._began = began
        self._seconds_for_adapters = seconds_for_adapters
        self._reservation = reservation
        self._notes = notes()
        self._context = service.tracing.context()
        self._wakeups = service.wakeups
        self._uses: Sequence[AdapterUse] = ()
        self._running: dict[int, Request] = {}
        self._num_begun = 0
        self._vectors: list[Vector | None] = [None] * len(self._inputs)
        self._num_cached_tokens = 0
        self._begun_at: float | None = None
        self._failure: RequestError | None = None
        self._is_left = False
        self._has_ended = asyncio.Event()

    async def run(
        self, uses: tuple[AdapterUse, ...], starts: Sequence[int], admission: Admission, width: int
    ) -> Pooled:
        """Have no more than `width` inputs with the engine at once, and `admission` given back after the last.

        `starts` says for each input which token its adapter applies to first. Raises RequestError.
        """
        self._uses = uses
        self._request_of = partial(self._request, uses, starts)
        self._admission = admission
        for _ in range(width):
            self._begin_next()
        try:
            await self._has_ended.wait()
        except BaseException:
            self._is_left = True
            self._stop()
            raise
        if self._failure is not None:
            raise self._failure
        vectors = [vector for vector in self._vectors if vector is not None]
        return Pooled(vectors, self._reads, self._uses, self._records, self._num_tokens(), self._num_cached_tokens)

    def _num_tokens(self, num_inputs: int | None = None) -> int:
        """Of the first so many inputs, or of all."""
        return sum(one.num_tokens for one in self._inputs[:num_inputs])

    def _request(self, uses: tuple[AdapterUse, ...], starts: Sequence[int], number: int) -> Request:
        request_id = structlog.contextvars.get_contextvars().get("request_id", "")
        filled = self._inputs[number].filled()
        return Request(
            request_id=f"{request_id}-{number}",
            prompt_ids=tuple(filled.token_ids),
            params=_NOTHING_GENERATED,
            emit=partial(self._post, number),
            adapters=uses,
            cache_salt=self._task.cache_salt,
            tenant=self._service.tenant,
            priority=self._task.urgency.priority,
            deadline=self._task.urgency.deadline(self._began),
            invoked_at=starts[number],
            reads=self._reads,
            token_types=None if filled.token_types is None else tuple(filled.token_types),
        )

    def _begin_next(self) -> None:
        number = self._num_begun
        if number < len(self._inputs) and self._failure is None and not self._is_left:
            self._num_begun += 1
            self._running[number] = self._request_of(number)
            self._service.engine.submit(self._running[number])

    def _post(self, number: int, event: TokenEvent) -> None:
        """Called on the engine's thread, once for each input."""
        self._wakeups.post(partial(self._end, number, event))

    def _end(self, number: int, event: TokenEvent) -> None:
        request = self._running.pop(number)
        self._vectors[number] = request.hidden
        self._num_cached_tokens += request.num_cached_tokens or 0
        self._begun_at = self._begun_at or request.begun_at
        if event.finish_reason is FinishReason.ERROR and self._failure is None:
            self._failure = RequestError(event.error_code, event.error)
            self._stop()
        self._begin_next()
        if not self._running:
            self._finish()

    def _stop(self) -> None:
        """Have the engine end what still runs."""
        for request in self._running.values():
            self._service.engine.abort(request)

    def _finish(self) -> None:
        del self._request_of  # which holds weights
        self._reservation.settle(self._num_tokens(self._num_begun))
        record = self._record()
        self._service.metrics.observe_pooling(record)
        if not self._is_left:
            self._mix.tell(None if self._failure is None else self._failure.code)
        self._service.tracing.record(record, self._asked)
        self._notes.update(record.told())
        self._admission.release()
        self._has_ended.set()

    def _asked(self) -> Asked:
        return Asked(
            operation=self._task.operation,
            model=self._task.model,
            records=self._records,
            tenant=self._service.tenant or DEFAULT_TENANT,
            num_cached_tokens=self._num_cached_tokens,
            error=self._failure.code if self._failure else None,
            parameters={},
            parent=self._context,
        )

    def _record(self) -> PoolingRecord:
        failed = Outcome.of_error(self._failure.code) if self._failure else Outcome.COMPLETED
        return PoolingRecord(
            outcome=Outcome.ABANDONED if self._is_left else failed,
            adapters=tuple(self._service.stored_name(record.name) for record in self._records),
            num_prompt_tokens=self._num_tokens(),
            num_inputs=len(self._inputs),
            seconds=time.monotonic() - self._began,
            seconds_for_adapters=self._seconds_for_adapters,
            seconds_queued=None if self._begun_at is None else self._begun_at - self._began,
        )
