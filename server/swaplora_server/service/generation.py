"""One generation: leased, submitted, read back as pieces of text, and aborted when nobody listens any more."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import structlog

from swaplora_adapters.files.naming import DEFAULT_TENANT
from swaplora_adapters.store.records import VersionRecord
from swaplora_adapters.weights.router import Trace
from swaplora_server.access.limits import NOTHING, Reservation
from swaplora_server.base.fingerprint import digest_of
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.engine.request import AdapterUse, FinishReason, Logprobs, Request, SamplingParams, TokenEvent
from swaplora_server.log_lines import notes
from swaplora_server.service.adapter_mix import (
    NOBODY,
    Asker,
    BoundMixture,
    MixTerm,
    invoked_at,
    lease_mix,
    wanted_by,
)
from swaplora_server.service.admission import NO_HURRY, Admission, Urgency
from swaplora_server.service.detokenize import Detokenizer, Echo, Settled, TextRules, TextToken, echo_of
from swaplora_server.service.errors import RequestError
from swaplora_server.service.gates.canaries import Trial
from swaplora_server.service.grammar.grammars import Grammar
from swaplora_server.service.grammar.source import GrammarSource
from swaplora_server.service.metrics.records import GenerationRecord, Outcome
from swaplora_server.service.service import Service
from swaplora_server.service.tracing.tracing import Asked
from swaplora_server.service.wakeups import in_time

_log = structlog.get_logger(__name__)
Encode = Callable[[], Awaitable[Sequence[Sequence[int]]]]  # what makes token ids of a request's prompts
MAX_SCORES = 2**19  # numbers that one answer has of its prompts
MAX_STREAMED_SCORES = 2**16
LONG_ECHO_TOKENS = 4096
_NUM_LAST_TOKENS = 32  # of a prompt, in which a mark of its end stands
_PATIENCE = 32  # events that may lie unread where nobody needs them one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTask:
    """What one request wants: n continuations of each of its prompts, by the base or by adapters.

    A refusal names the request's fields as the last two say.
    """

    model: str
    encode: Encode
    sampling: SamplingParams  # how, but for the number of tokens and for the ids that end every text
    num_prompts: int = 1
    adapters: tuple[MixTerm, ...] = ()  # added to the base, which is then the model
    max_tokens: int | None = None  # None: as many as fit
    ignore_eos: bool = False
    n: int = 1
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    shown: frozenset[str] = frozenset()  # special tokens that are shown all the same, so that the text can be read
    has_echo: bool = False  # whether each choice begins with its prompt
    is_streamed: bool = False  # whether each piece is wanted as soon as it is there
    cache_salt: str | None = None
    urgency: Urgency = NO_HURRY
    format: GrammarSource | None = None  # what the text keeps to
    asker: Asker = NOBODY
    operation: str = "text_completion"  # or chat, for traces
    mixture: BoundMixture | None = None  # what the model stands for, where that was looked up before
    trace: Trace | None = None  # shown what the tokens take of a mixture's members
    prompt_param: Callable[[int], str] = lambda _number: "prompt"  # of the prompt of this number
    length_param: str = "max_tokens"


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
        return _num_scores(self._task, self._prompts) > LONG_ECHO_TOKENS

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
    _check_sampling_ids(service, task.sampling)
    limit = min(_room(service, task, number, prompt) for number, prompt in enumerate(prompts))
    params = _params(service, task, limit)
    echoes = await _echoes(service, task, prompts)
    grammar = None if task.format is None else await service.grammars.grammar(task.format)
    service.check_serving()
    most = sum(map(len, prompts)) + len(prompts) * task.n * params.max_tokens
    reservation = service.reserve_tokens(most, task.length_param)
    try:
        mix = await lease_mix(service, task.model, task.adapters, task.asker, admission, task.trace, task.mixture)
        asked_at = time.monotonic()
        uses = await mix.uses()
        _check_generating(uses)
        seconds = time.monotonic() - asked_at
        starts = [invoked_at(prompt, uses, task.prompt_param(number)) for number, prompt in enumerate(prompts)]
        generation = Generation(
            service, task, prompts, params, mix.records, began, echoes, grammar, seconds, reservation, mix.trial
        )
    except BaseException:
        reservation.settle(0)
        raise
    return generation, uses, starts


def _check_generating(uses: Sequence[AdapterUse]) -> None:
    """Raise RequestError for an adapter that was trained to classify."""
    if any(use.weights.head is not None for use in uses):
        message = "the adapter classifies, and generates nothing: ask it at POST /classify, or for tokens at /pooling"
        raise RequestError("invalid_request", message, "model")


async def _echoes(service: Service, task: GenerationTask, prompts: Sequence[Sequence[int]]) -> Sequence[Echo]:
    """What the choices of each prompt begin with, if they do. Raises RequestError where that is too much."""
    num_scores, most = _num_scores(task, prompts), MAX_STREAMED_SCORES if task.is_streamed else MAX_SCORES
    if num_scores > most:
        message = (
            f"{num_scores} numbers and tokens are asked for of the prompts, and an answer has at most {most}: that is "
            "the prompts' tokens times the choices, times one more than the likeliest wanted: send fewer prompts"
        )
        raise RequestError("invalid_request", message, task.prompt_param(0))
    if not task.has_echo:
        return ()
    rules, size = _text_rules(service, task), sum(map(len, prompts))

    def echo() -> list[Echo]:
        return [echo_of(rules, prompt) for prompt in prompts]

    return echo() if size <= LONG_ECHO_TOKENS else await service.offload.do(size, echo)


def _num_scores(task: GenerationTask, prompts: Sequence[Sequence[int]]) -> int:
    """What an answer has of its prompts: of each token, in each choice, itself, and the likeliest in its place."""
    num_logprobs = task.sampling.num_prompt_logprobs
    each = task.has_echo if num_logprobs is None else 1 + num_logprobs
    return sum(map(len, prompts)) * task.n * each


def _params(service: Service, task: GenerationTask, max_tokens: int) -> SamplingParams:
    """What the engine is told; the end-of-sequence ids stop a request unless it ignores them. Raises RequestError."""
    asked = task.sampling
    if asked.min_tokens > max_tokens:
        message = f"min_tokens is {asked.min_tokens}, and at most {max_tokens} tokens may be generated: ask for no more"
        raise RequestError("invalid_request", message, "min_tokens")
    ends = asked.stop_token_ids | (frozenset() if task.ignore_eos else service.base.eos_token_ids)
    if asked.min_tokens and asked.allowed_token_ids is not None and asked.allowed_token_ids <= ends:
        message = "allowed_token_ids has only tokens that end the answer, which none of the first min_tokens may do"
        raise RequestError("invalid_request", f"{message}: allow others, or leave min_tokens out", "allowed_token_ids")
    return replace(asked, max_tokens=max_tokens, stop_token_ids=ends)


def _check_sampling_ids(service: Service, asked: SamplingParams) -> None:
    check_ids(service, asked.stop_token_ids, "stop_token_ids")
    check_ids(service, asked.allowed_token_ids or (), "allowed_token_ids")
    check_ids(service, [token_id for token_id, _ in asked.logit_bias], "logit_bias")


def check_ids(service: Service, token_ids: Collection[int], param: str) -> None:
    """Raise RequestError for an id that the base has no token for: it would index what is not there."""
    largest, limit = max(token_ids, default=0), service.base.vocab_size
    if largest >= limit:
        message = f"{param}: token id {largest} is not in the base's vocabulary, whose ids end at {limit - 1}"
        raise RequestError("invalid_request", message, param)


def _room(service: Service, task: GenerationTask, number: int, prompt: Sequence[int]) -> int:
    """How many tokens may follow `prompt`. Raises RequestError when it, or it and what is asked for, do not fit."""
    param = task.prompt_param(number)
    if not prompt:
        raise RequestError("invalid_request", f"{param} is empty", param)
    check_ids(service, prompt, param)
    room, wanted = service.max_model_len - len(prompt), 1 if task.max_tokens is None else task.max_tokens
    if wanted > room:
        is_too_long = room < 1 or task.max_tokens is None
        raise RequestError(
            "context_length_exceeded",
            f"This model's maximum context length is {service.max_model_len} tokens. However, you requested "
            f"{len(prompt) + wanted} tokens ({len(prompt)} in the prompt, {wanted} to generate). "
            f"{f'Shorten {param}' if is_too_long else f'Ask for at most {room}, or shorten {param}'}.",
            param if is_too_long else task.length_param,
        )
    return room if task.max_tokens is None else task.max_tokens
