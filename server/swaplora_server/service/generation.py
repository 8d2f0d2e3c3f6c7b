"""One generation: leased, submitted, read back as pieces of text, and aborted when nobody listens any more."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import structlog

from swaplora_adapters.files.naming import DEFAULT_TENANT
from swaplora_adapters.store.records import VersionRecord
from swaplora_server.access.limits import NOTHING, Reservation
from swaplora_server.base.fingerprint import digest_of
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.engine.request import AdapterUse, FinishReason, Logprobs, Request, SamplingParams, TokenEvent
from swaplora_server.log_lines import notes
from swaplora_server.service.adapter_mix import awaited_uses, invoked_at, lease_mix, wanted_by
from swaplora_server.service.admission import Admission
from swaplora_server.service.detokenize import Detokenizer, Echo, Settled, TextRules, TextToken, echo_of
from swaplora_server.service.errors import RequestError
from swaplora_server.service.gates.canaries import Trial
from swaplora_server.service.generating.checks import check_scores, check_uses, num_scores, params_of
from swaplora_server.service.generating.task import GenerationTask
from swaplora_server.service.grammar.grammars import Grammar
from swaplora_server.service.metrics.records import GenerationRecord, Outcome
from swaplora_server.service.service import Service
from swaplora_server.service.tracing.tracing import Asked
from swaplora_server.service.wakeups import in_time

_log = structlog.get_logger(__name__)
LONG_ECHO_TOKENS = 4096
_NUM_LAST_TOKENS = 32  # of a prompt, in which a mark of its end stands
_PATIENCE = 32  # events that may lie unread where nobody needs them one by one


class Piece(NamedTuple):
    """What one step added to one choice. `text` may be empty while a character or a stop string is incomplete.

    `tokens` are those with logprobs that the text up to here is made of and that were not in a piece before; `ending`
    is the one that ended the text and is not in it, and `logprob` that of the token, where these are wanted.
    """

    choice: int
    text: str
    token_id: int | None
    tokens: Sequence[TextToken]
    finish_reason: FinishReason | None
    ending: TextToken | None = None
    logprob: float | None = None
    stopped_by: str | None = None  # the stop string, where one ended the text


class Generation:
    """The choices of one request: n continuations of each prompt, in one stream of pieces.

    Owns the requests until each of its choices has ended. Lives on the event loop; the engine posts events to it.
    """

    def __init__(
        self,
        service: Service,
        task: GenerationTask,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        records: Sequence[VersionRecord],
        began: float,
        echoes: Sequence[Echo] = (),
        grammar: Grammar | None = None,
        seconds_for_adapters: float = 0.0,
        reservation: Reservation = NOTHING,
        tell: Trial | None = None,
    ) -> None:
        """`began` is the moment, on the monotonic clock, at which the client's wait began.

        `tell` hears the code of the error that it ended with, or None once it is whole.
        """
        self._service = service
        self._task = task
        self._prompts = prompts
        self._params = params
        self.records = records  # the versions that answer; of a sum all, in order; none for the base
        self._began = began
        self._seconds_for_adapters = seconds_for_adapters
        self._reservation = reservation
        self._tell = tell
        self._grammar = grammar
        self._notes = notes()
        self._context = service.tracing.context()
        self._request_id = structlog.contextvars.get_contextvars().get("request_id", "")  # as its log lines have it
        self._first_at = self._last_at = 0.0
        self._wakeups = service.wakeups
        self._events: deque[tuple[int, TokenEvent]] = deque()
        self._has_come = asyncio.Event()
        self._is_read_at_once = task.is_streamed or bool(task.stops)
        self._requests: list[Request] = []
        self._use_keys: list[str] = []  # of those that answer
        rules = _text_rules(service, task)
        ends = [rules.end_of(prompt) for prompt in prompts]  # once for all choices: a prompt may be long
        self._detokenizers = [Detokenizer(rules, end, is_echoed=task.has_echo) for end in ends for _ in range(task.n)]
        self._open = set(range(len(self._detokenizers)))
        self._scores: list[list[Logprobs]] = [[] for _ in prompts]  # which the engine fills
        self._echoes = echoes
        self._to_be_echoed = set(self._open) if task.has_echo else set()
        self.outcome: Outcome | None = None  # None while a choice is open
        self.num_generated = [0] * len(self._detokenizers)
        self._reasons = [FinishReason.ABORT] * len(self._detokenizers)  # until they end otherwise
        self._num_cached_tokens = 0  # of requests that have been let go of

    @property
    def num_choices(self) -> int:
        return len(self._detokenizers)

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the base, by which tokens have names."""
        return self._service.base.vocabulary

    @property
    def fingerprint(self) -> str:
        """Of all that decides the answer to its request: what computes it, and the versions that take part, and how."""
        return f"fp_{digest_of([self._service.fingerprint, self._use_keys])[:16]}"

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self._prompts))

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompts that were in the cache when their requests began."""
        return self._num_cached_tokens + sum(request.num_cached_tokens or 0 for request in self._requests)

    def prompt_ids(self, choice: int) -> Sequence[int]:
        return self._prompts[choice // self._task.n]

    def prompt_end(self, choice: int) -> str:
        """The last words of its prompt."""
        return self.vocabulary.text_of(self.prompt_ids(choice)[-_NUM_LAST_TOKENS:])

    def prompt_scores(self, choice: int) -> Sequence[Logprobs]:
        """Of each token of its prompt but the first, where they are wanted, once something has come."""
        return self._scores[choice // self._task.n]

    @property
    def has_long_prompts(self) -> bool:
        """Whether so much is said of its prompts that it takes long to write."""
        return num_scores(self._task, self._prompts) > LONG_ECHO_TOKENS

    def submit(self, uses: tuple[AdapterUse, ...], starts: Sequence[int], admission: Admission) -> None:
        """Hand every prompt to the engine, which has `admission` given back when the last of them has ended.

        `starts` says for each prompt which token its adapter applies to first.
        """
        release = admission.release_after(len(self._prompts))
        self._use_keys = [use.key for use in uses]
        grammar = self._grammar
        constraint = None if grammar is None else partial(grammar.constraint, self._params.stop_token_ids)
        for number, (prompt, start) in enumerate(zip(self._prompts, starts, strict=True)):
            request = Request(
                request_id=f"{self._request_id}-{number}",
                prompt_ids=tuple(prompt),
                params=self._params,
                emit=partial(self._post, number * self._task.n),
                adapters=uses,
                num_sequences=self._task.n,
                release=release,
                cache_salt=self._task.cache_salt,
                tenant=self._service.tenant,
                priority=self._task.urgency.priority,
                deadline=self._task.urgency.deadline(self._began),
                invoked_at=start,
                scores=self._scores[number],
                new_constraint=constraint,
            )
            self._requests.append(request)
            self._service.engine.submit(request)

    async def arrival(self) -> None:
        """Return once something may have come since this was last called."""
        await self._has_come.wait()
        self._has_come.clear()

    def arrived(self) -> Iterator[Piece]:
        """What has come and was not read yet. Raises RequestError, after which nothing comes any more."""
        while self._events:
            choice, event = self._events.popleft()
            if choice in self._open:
                piece = self._piece(choice, event)
                if choice in self._to_be_echoed:
                    yield self._echo(choice)
                yield piece

    def abort(self) -> None:
        """Have the engine end what still runs, and let go of it. Harmless when nothing does."""
        if self._open:
            self._abort(Outcome.ABANDONED)

    def _abort(self, outcome: Outcome, error: str | None = None) -> None:
        for request in self._requests:
            self._service.engine.abort(request)
        self._end(outcome, error)

    def _end(self, outcome: Outcome, error: str | None = None) -> None:
        self.outcome = outcome
        self._num_cached_tokens = self.num_cached_tokens
        record = self._record(outcome)
        self._open.clear()
        self._requests.clear()  # which point back here: weights must not wait for the cycle collector
        self._reservation.settle(self.num_prompt_tokens + sum(self.num_generated))
        self._service.metrics.observe(record)
        if self._tell is not None and outcome is not Outcome.ABANDONED:
            self._tell(error)
        self._service.tracing.record(record, self._asked)
        self._notes.update(record.told())

    def _asked(self) -> Asked:
        task, params = self._task, self._params
        return Asked(
            operation=task.operation,
            model=task.model,
            records=self.records,
            tenant=self._service.tenant or DEFAULT_TENANT,
            num_cached_tokens=self._num_cached_tokens,
            error=self._notes.get("error"),
            parameters={
                "max_tokens": params.max_tokens,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
                "presence_penalty": params.presence_penalty,
                "frequency_penalty": params.frequency_penalty,
                "seed": params.seed,
                "choice.count": task.n,
                "stream": task.is_streamed,
            },
            parent=self._context,
        )

    def _record(self, outcome: Outcome) -> GenerationRecord:
        began, has_first = self._began, any(self.num_generated)
        begun = [request.begun_at for request in self._requests if request.begun_at is not None]
        is_failed = outcome in (Outcome.FAILED, Outcome.EXPIRED)
        return GenerationRecord(
            outcome=outcome,
            tenant=self._service.tenant,
            adapters=tuple(self._service.stored_name(record.name) for record in self.records),
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated=tuple(self.num_generated),
            finish_reasons=tuple(
                FinishReason.ERROR if is_failed and choice in self._open else reason
                for choice, reason in enumerate(self._reasons)
            ),
            n=self._task.n,
            max_tokens=self._params.max_tokens,
            seconds=time.monotonic() - began,
            seconds_for_adapters=self._seconds_for_adapters,
            seconds_queued=min(begun) - began if begun else None,
            seconds_to_first=self._first_at - began if has_first else None,
            seconds_to_last=self._last_at - began if has_first else None,
        )

    def _post(self, first_choice: int, event: TokenEvent) -> None:
        """Called on the engine's thread."""
        self._last_at = time.monotonic()
        self._first_at = self._first_at or self._last_at
        self._events.append((first_choice + event.index, event))
        if self._is_read_at_once or event.finish_reason is not None or len(self._events) >= _PATIENCE:
            self._wakeups.post(self._has_come.set)

    def _piece(self, choice: int, event: TokenEvent) -> Piece:
        if event.finish_reason is FinishReason.ERROR:
            self._notes["error"] = event.error_code
            self._abort(Outcome.of_error(event.error_code), event.error_code)
            raise RequestError(event.error_code, event.error)
        try:
            settled = self._settled(choice, event)
        except Exception as error:
            _log.exception("text cannot be made", error=repr(error))
            self._abort(Outcome.FAILED, "engine_failed")
            message = "no text can be made of the tokens of this answer; see the server's log"
            raise RequestError("engine_failed", message) from error
        reason = event.finish_reason
        if self._detokenizers[choice].is_stopped and reason is not FinishReason.STOP:
            reason = FinishReason.STOP
            self._service.engine.abort(self._requests[choice // self._task.n], choice % self._task.n)
        if reason is not None:
            self._reasons[choice] = reason
            self._open.discard(choice)
            if not self._open:
                self._end(Outcome.COMPLETED)
        stopped_by = self._detokenizers[choice].stopped_by
        piece = Piece(choice, settled.text, event.token_id, settled.tokens, reason, stopped_by=stopped_by)
        if event.logprobs is None or event.token_id is None:
            return piece
        is_ending = event.finish_reason is FinishReason.STOP and not self._task.include_stop
        ending = TextToken(event.token_id, b"", event.logprobs) if is_ending else None
        return piece._replace(ending=ending, logprob=event.logprobs.chosen)

    def _echo(self, choice: int) -> Piece:
        """Its prompt, which its text begins with, with as many logprobs as its own tokens have."""
        self._to_be_echoed.discard(choice)
        echo, most, scored = self._echoes[choice // self._task.n], self._params.num_logprobs, self.prompt_scores(choice)
        if most is None or self._params.num_prompt_logprobs is None:
            return Piece(choice, echo.text, None, (), None)
        if most < self._params.num_prompt_logprobs:
            scored = [replace(one, top=one.top[:most]) for one in scored]
        told = zip(self.prompt_ids(choice), echo.data, [None, *scored], strict=True)
        return Piece(choice, echo.text, None, [TextToken(*token) for token in told], None)

    def _settled(self, choice: int, event: TokenEvent) -> Settled:
        """The text that the event adds, and with an end all that was held back."""
        detokenizer, settled = self._detokenizers[choice], Settled("")
        if event.token_id is not None:
            self.num_generated[choice] += 1
            # a token that ends the text is counted, not shown
            if event.finish_reason is not FinishReason.STOP or self._task.include_stop:
                settled = detokenizer.push(event.token_id, event.logprobs)
        if event.finish_reason is None or detokenizer.is_stopped:
            return settled
        rest = detokenizer.flush()
        return Settled(settled.text + rest.text, [*settled.tokens, *rest.tokens])


def _text_rules(service: Service, task: GenerationTask) -> TextRules:
    return TextRules(
        service.base.vocabulary,
        task.stops,
        task.sampling.may_end_at,
        include_stop=task.include_stop,
        skip_special_tokens=task.skip_special_tokens,
        shown=task.shown,
    )


async def generate(service: Service, task: GenerationTask) -> Generation:
    """Make and check the prompts, bind the names of who answers to versions, wait for their weights, and submit.

    Whoever there is no room for is refused before anything is made. Whoever is cancelled leaves nothing behind. Raises
    RequestError, and AdapterError for an adapter that cannot be had.
    """
    began = time.monotonic()
    service.check_serving()
    service.check_generating()
    service.admissions.check_number(task.n, task.num_prompts)
    wanted = wanted_by(service, task.model, task.adapters)
    admission = service.admissions.admit(task.n * task.num_prompts, service.tenant, wanted, service.peer)
    try:
        async with in_time(task.urgency.deadline(began)):
            generation, uses, starts = await _prepared(service, task, began, admission)
    except BaseException:
        admission.release(has_run=False)
        raise
    generation.submit(uses, starts, admission)
    return generation


async def _prepared(
    service: Service, task: GenerationTask, began: float, admission: Admission
) -> tuple[Generation, tuple[AdapterUse, ...], list[int]]:
    """With what `Generation.submit` takes."""
    prompts = await task.encode()
    service.check_serving()
    params = params_of(service, task, prompts)
    echoes = await _echoes(service, task, prompts)
    grammar = None if task.format is None else await service.grammars.grammar(task.format)
    service.check_serving()
    most = sum(map(len, prompts)) + len(prompts) * task.n * params.max_tokens
    reservation = await service.reserve_tokens(most, task.length_param)
    try:
        mix = await lease_mix(service, task.model, task.adapters, task.asker, admission, task.trace, task.mixture)
        asked_at = time.monotonic()
        uses = await awaited_uses(service, mix, task.urgency)
        check_uses(uses)
        seconds = time.monotonic() - asked_at
        starts = [invoked_at(prompt, uses, task.prompt_param(number)) for number, prompt in enumerate(prompts)]
        generation = Generation(
            service, task, prompts, params, mix.records, began, echoes, grammar, seconds, reservation, mix.trial
        )
    except BaseException:
        reservation.settle(0)
        raise
    return generation, uses, starts


async def _echoes(service: Service, task: GenerationTask, prompts: Sequence[Sequence[int]]) -> Sequence[Echo]:
    """What the choices of each prompt begin with, if they do. Raises RequestError where that is too much."""
    check_scores(task, prompts)
    if not task.has_echo:
        return ()
    rules, size = _text_rules(service, task), sum(map(len, prompts))

    def echo() -> list[Echo]:
        return [echo_of(rules, prompt) for prompt in prompts]

    return echo() if size <= LONG_ECHO_TOKENS else await service.offload.do(size, echo)
