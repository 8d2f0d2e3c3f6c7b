"""One request for vectors: its inputs go to the engine a few at a time, beside all others, and come back in order."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from swaplora_adapters.store.records import VersionRecord
from swaplora_server.access.limits import NOTHING, Reservation
from swaplora_server.engine.pooling.kinds import Reader
from swaplora_server.engine.request import AdapterUse, FinishReason, Request, SamplingParams, TokenEvent, Vector
from swaplora_server.log_lines import notes
from swaplora_server.service.adapter_mix import NOBODY, AdapterMix, Asker, MixTerm, invoked_at, lease_mix, wanted_by
from swaplora_server.service.admission import NO_HURRY, Admission, Urgency
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generation import Encode, check_ids
from swaplora_server.service.metrics.records import GenerationRecord, Outcome
from swaplora_server.service.service import Service
from swaplora_server.service.wakeups import in_time

_NOTHING_GENERATED = SamplingParams(max_tokens=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingTask:
    """What one request wants: a vector of each of its inputs, by the base or by adapters."""

    model: str
    encode: Encode
    num_inputs: int
    adapters: tuple[MixTerm, ...] = ()  # added to the base, which is then the model
    reader: Callable[[Sequence[AdapterUse]], Reader]  # what reads inputs' hidden states, by who answers
    cache_salt: str | None = None
    urgency: Urgency = NO_HURRY
    asker: Asker = NOBODY
    input_param: Callable[[int], str] = lambda _number: "input"  # of the input of this number


@dataclass(frozen=True, slots=True)
class Pooled:
    """What came of it: what was read of each input, in their order; an embedding is [hidden_size]."""

    vectors: Sequence[Vector]
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
    width = min(task.num_inputs, service.max_rows)
    wanted = wanted_by(service, task.model, task.adapters)
    admission, reservation = service.admissions.admit(width, service.tenant, wanted), NOTHING
    try:
        async with in_time(task.urgency.deadline(began)):
            inputs = await task.encode()
            service.check_serving()
            for number, token_ids in enumerate(inputs):
                check_input(service, token_ids, task.input_param(number))
            reservation = service.reserve_tokens(sum(map(len, inputs)), task.input_param(0))
            mix = await lease_mix(service, task.model, task.adapters, task.asker, admission)
            asked_at = time.monotonic()
            uses = await mix.uses()
            seconds = time.monotonic() - asked_at
            reads = task.reader(uses)
        starts = [invoked_at(token_ids, uses, task.input_param(number)) for number, token_ids in enumerate(inputs)]
    except BaseException:
        reservation.settle(0)
        admission.release()
        raise
    pooling = _Pooling(service, task, inputs, mix, reads, began, seconds, reservation)
    return await pooling.run(uses, starts, admission, width)


def check_input(service: Service, token_ids: Sequence[int], param: str) -> None:
    """Raise RequestError for an input that is empty, is not of the base's vocabulary, or does not fit the context."""
    if not token_ids:
        raise RequestError("invalid_request", f"{param} is empty: send some text, or leave it out", param)
    check_ids(service, token_ids, param)
    if len(token_ids) > service.max_model_len:
        raise RequestError(
            "context_length_exceeded",
            f"This model's maximum context length is {service.max_model_len} tokens. However, {param} has "
            f"{len(token_ids)}. Shorten it, or send truncate_prompt_tokens, of which -1 keeps as many as fit.",
            param,
        )


class _Pooling:
    """The inputs of one request on their way. Lives on the event loop; the engine posts ends to it."""

    def __init__(
        self,
        service: Service,
        task: PoolingTask,
        inputs: Sequence[Sequence[int]],
        mix: AdapterMix,
        reads: Reader,
        began: float,
        seconds_for_adapters: float,
        reservation: Reservation,
    ) -> None:
        """`began` is the moment, on the monotonic clock, at which the client's wait began."""
        self._service = service
        self._task = task
        self._inputs = inputs
        self._records = mix.records
        self._reads = reads
        self._began = began
        self._seconds_for_adapters = seconds_for_adapters
        self._reservation = reservation
        self._notes = notes()
        self._wakeups = service.wakeups
        self._uses: Sequence[AdapterUse] = ()
        self._running: dict[int, Request] = {}
        self._num_begun = 0
        self._vectors: list[Vector | None] = [None] * len(inputs)
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
        num_tokens = sum(map(len, self._inputs))
        return Pooled(vectors, self._uses, self._records, num_tokens, self._num_cached_tokens)

    def _request(self, uses: tuple[AdapterUse, ...], starts: Sequence[int], number: int) -> Request:
        request_id = structlog.contextvars.get_contextvars().get("request_id", "")
        return Request(
            request_id=f"{request_id}-{number}",
            prompt_ids=tuple(self._inputs[number]),
            params=_NOTHING_GENERATED,
            emit=partial(self._post, number),
            adapters=uses,
            cache_salt=self._task.cache_salt,
            tenant=self._service.tenant,
            priority=self._task.urgency.priority,
            deadline=self._task.urgency.deadline(self._began),
            invoked_at=starts[number],
            reads=self._reads,
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
        self._reservation.settle(sum(len(self._inputs[number]) for number in range(self._num_begun)))
        record = self._record()
        self._service.metrics.observe(record)
        self._notes.update(record.told())
        self._admission.release()
        self._has_ended.set()

    def _record(self) -> GenerationRecord:
        failed = Outcome.of_error(self._failure.code) if self._failure else Outcome.COMPLETED
        outcome = Outcome.ABANDONED if self._is_left else failed
        reason = {Outcome.COMPLETED: FinishReason.STOP, Outcome.ABANDONED: FinishReason.ABORT}
        return GenerationRecord(
            outcome=outcome,
            adapters=tuple(self._service.stored_name(record.name) for record in self._records),
            num_prompt_tokens=sum(map(len, self._inputs)),
            num_generated=(0,) * len(self._inputs),
            finish_reasons=(reason.get(outcome, FinishReason.ERROR),) * len(self._inputs),
            max_tokens=0,
            seconds=time.monotonic() - self._began,
            seconds_for_adapters=self._seconds_for_adapters,
            seconds_queued=None if self._begun_at is None else self._begun_at - self._began,
            seconds_to_first=None,
            seconds_to_last=None,
        )
