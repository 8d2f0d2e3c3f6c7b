"""One HTTP generation: leased, submitted, read back as pieces of text, and aborted when nobody listens any more."""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import structlog
from starlette.requests import Request as HttpRequest

from swaplora_server.engine.request import AdapterUse, FinishReason, Request, SamplingParams, TokenEvent
from swaplora_server.http.sse import until_disconnect
from swaplora_server.http.wire import GenerationBody
from swaplora_server.service.adapter_mix import AdapterMix, lease_mix
from swaplora_server.service.detokenize import Detokenizer, Settled, TextRules, TextToken
from swaplora_server.service.errors import RequestError
from swaplora_server.service.invocation import invoked_at
from swaplora_server.service.metrics import Outcome, Record
from swaplora_server.service.service import Service

_SESSION_HEADER = "x-session-id"
_log = structlog.get_logger(__name__)
Encode = Callable[[], Awaitable[Sequence[Sequence[int]]]]  # what makes token ids of a request's prompts
_PATIENCE = 32  # events that may lie unread where nobody needs them one by one


class Piece(NamedTuple):
    """What one step added to one choice. `text` may be empty while a character or a stop string is incomplete.

    `tokens` are those with logprobs that the text up to here is made of and that were not in a piece before.
    """

    choice: int
    text: str
    token_id: int | None
    tokens: Sequence[TextToken]
    finish_reason: FinishReason | None


class GenerationError(Exception):
    """The engine ended a sequence with an error; code and message are for the client."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Generation:
    """The choices of one HTTP request: n continuations of each prompt, in one stream of pieces.

    Owns the requests until each of its choices has ended. Lives on the event loop; the engine posts events to it.
    """

    def __init__(
        self,
        service: Service,
        body: GenerationBody,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        began: float,
    ) -> None:
        """`began` is the moment, on the monotonic clock, at which the client's wait began."""
        self._service = service
        self._body = body
        self._prompts = prompts
        self._params = params
        self._began = began
        self._request_id = structlog.contextvars.get_contextvars().get("request_id", "")  # the answer's X-Request-Id
        self._first_at = self._last_at = 0.0
        self._wakeups = service.wakeups
        self._events: deque[tuple[int, TokenEvent]] = deque()
        self._has_come = asyncio.Event()
        self._is_read_at_once = body.stream or bool(body.stops)
        self._requests: list[Request] = []
        rules = self._text_rules()
        ends = [rules.end_of(prompt) for prompt in prompts]  # once for all choices: a prompt may be long
        self._detokenizers = [Detokenizer(rules, end) for end in ends for _ in range(body.n)]
        self._open = set(range(len(self._detokenizers)))
        self.outcome: Outcome | None = None  # None while a choice is open
        self.num_generated = [0] * len(self._detokenizers)
        self._num_cached_tokens = 0  # of requests that have been let go of

    @property
    def num_choices(self) -> int:
        return len(self._detokenizers)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self._prompts))

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompts that were in the cache when their requests began."""
        return self._num_cached_tokens + sum(request.num_cached_tokens or 0 for request in self._requests)

    def prompt_ids(self, choice: int) -> Sequence[int]:
        return self._prompts[choice // self._body.n]

    def submit(self, uses: tuple[AdapterUse, ...], terms: AdapterMix, starts: Sequence[int]) -> None:
        """Hand every prompt to the engine, and with them the leases, which go back when the last of them has ended.

        `starts` says for each prompt which token its adapter applies to first.
        """

        def give_back() -> None:
            self._service.leave(self.num_choices)
            terms.release()

        release = _after_last(len(self._prompts), give_back)
        for number, (prompt, start) in enumerate(zip(self._prompts, starts, strict=True)):
            request = Request(
                request_id=f"{self._request_id}-{number}",
                prompt_ids=tuple(prompt),
                params=self._params,
                emit=partial(self._post, number * self._body.n),
                adapters=uses,
                num_sequences=self._body.n,
                release=release,
                cache_salt=self._body.cache_salt,
                invoked_at=start,
            )
            self._requests.append(request)
            self._service.engine.submit(request)

    async def arrival(self) -> None:
        """Return once something may have come since this was last called."""
        await self._has_come.wait()
        self._has_come.clear()

    def arrived(self) -> Iterator[Piece]:
        """What has come and was not read yet. Raises GenerationError, after which nothing comes any more."""
        while self._events:
            choice, event = self._events.popleft()
            if choice in self._open:
                yield self._piece(choice, event)

    def abort(self) -> None:
        """Have the engine end what still runs, and let go of it. Harmless when nothing does."""
        if self._open:
            self._abort(Outcome.ABANDONED)

    def _abort(self, outcome: Outcome) -> None:
        for request in self._requests:
            self._service.engine.abort(request)
        self._end(outcome)

    def _end(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._open.clear()
        self._num_cached_tokens = self.num_cached_tokens
        self._requests.clear()  # which point back here: weights must not wait for the cycle collector
        self._service.metrics.observe(self._record(outcome))

    def _record(self, outcome: Outcome) -> Record:
        longest = max(self.num_generated)
        return Record(
            outcome,
            self.num_prompt_tokens,
            sum(self.num_generated),
            seconds=time.monotonic() - self._began,
            seconds_to_first=self._first_at - self._began if longest else None,
            seconds_per_token=(self._last_at - self._first_at) / (longest - 1) if longest > 1 else None,
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
            self._abort(Outcome.FAILED)
            raise GenerationError(event.error_code, event.error)
        try:
            settled = self._settled(choice, event)
        except Exception as error:
            _log.exception("text cannot be made", error=repr(error))
            self._abort(Outcome.FAILED)
            message = "no text can be made of the tokens of this answer; see the server's log"
            raise GenerationError("engine_failed", message) from error
        reason = event.finish_reason
        if self._detokenizers[choice].is_stopped and reason is not FinishReason.STOP:
            reason = FinishReason.STOP
            self._service.engine.abort(self._requests[choice // self._body.n], choice % self._body.n)
        if reason is not None:
            self._open.discard(choice)
            if not self._open:
                self._end(Outcome.COMPLETED)
        return Piece(choice, settled.text, event.token_id, settled.tokens, reason)

    def _settled(self, choice: int, event: TokenEvent) -> Settled:
        """The text that the event adds, and with an end all that was held back."""
        detokenizer, settled = self._detokenizers[choice], Settled("")
        if event.token_id is not None:
            self.num_generated[choice] += 1
            # a token that ends the text is counted, not shown
            if event.finish_reason is not FinishReason.STOP or self._body.include_stop_str_in_output:
                settled = detokenizer.push(event.token_id, event.logprobs)
        if event.finish_reason is None or detokenizer.is_stopped:
            return settled
        rest = detokenizer.flush()
        return Settled(settled.text + rest.text, [*settled.tokens, *rest.tokens])

    def _text_rules(self) -> TextRules:
        return TextRules(
            self._service.base.vocabulary,
            self._body.stops,
            self._params.may_end_at,
            include_stop=self._body.include_stop_str_in_output,
            skip_special_tokens=self._body.skip_special_tokens,
        )


@dataclass(frozen=True, slots=True)
class Admission:
    """A generation that has begun, and the headers that say who answers it."""

    generation: Generation
    headers: dict[str, str]


async def admit(
    http_request: HttpRequest,
    service: Service,
    body: GenerationBody,
    encode: Encode,
    *,
    max_tokens: int | None,
    num_logprobs: int | None = None,
) -> Admission:
    """Make and check the prompts, bind the names of who answers to versions, wait for their weights, and submit.

    max_tokens None means as many as fit. Raises RequestError, AdapterError for an adapter that cannot be had, and
    ClientGoneError for a client that does not wait for it.
    """
    client = http_request.headers.get(_SESSION_HEADER) or body.user or None  # an empty one names nobody
    admission = _admit(service, body, encode, client, max_tokens=max_tokens, num_logprobs=num_logprobs)
    return await until_disconnect(http_request.receive, admission)


async def _admit(
    service: Service,
    body: GenerationBody,
    encode: Encode,
    client: str | None,
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
) -> Admission:
    began = time.monotonic()
    prompts = await encode()
    service.check_serving()
    _check_ids(service, body.stop_token_ids or (), "stop_token_ids")
    limit = min(_room(service, body, number, prompt, max_tokens) for number, prompt in enumerate(prompts))
    service.enter(len(prompts) * body.n)
    terms = None
    try:
        terms = await lease_mix(service, body, client)
        uses = await terms.uses()
        starts = [invoked_at(prompt, uses, body.prompt_param(number)) for number, prompt in enumerate(prompts)]
        params = body.sampling(limit, service.base.eos_token_ids, num_logprobs)
        generation = Generation(service, body, prompts, params, began)
    except BaseException:
        service.leave(len(prompts) * body.n)
        if terms is not None:
            terms.release()
        raise
    generation.submit(uses, terms, starts)
    return Admission(generation, terms.headers)


def _check_ids(service: Service, token_ids: Sequence[int], param: str) -> None:
    """Raise RequestError for an id that the base has no token for: it would index what is not there."""
    largest, limit = max(token_ids, default=0), service.base.vocab_size
    if largest >= limit:
        message = f"{param}: token id {largest} is not in the base's vocabulary, whose ids end at {limit - 1}"
        raise RequestError("invalid_request", message, param)


def _room(service: Service, body: GenerationBody, number: int, prompt: Sequence[int], max_tokens: int | None) -> int:
    """How many tokens may follow `prompt`. Raises RequestError when it, or it and what is asked for, do not fit."""
    param = body.prompt_param(number)
    if not prompt:
        raise RequestError("invalid_request", f"{param} is empty", param)
    _check_ids(service, prompt, param)
    room, wanted = service.max_model_len - len(prompt), max_tokens or 1
    if wanted > room:
        is_too_long = room < 1 or max_tokens is None
        raise RequestError(
            "context_length_exceeded",
            f"This model's maximum context length is {service.max_model_len} tokens. However, you requested "
            f"{len(prompt) + wanted} tokens ({len(prompt)} in the prompt, {wanted} to generate). "
            f"{f'Shorten {param}' if is_too_long else f'Ask for at most {room}, or shorten {param}'}.",
            param if is_too_long else body.length_param,
        )
    return max_tokens or room


def _after_last(count: int, release: Callable[[], None]) -> Callable[[], None]:
    """A function that calls `release` when it is itself called for the `count`th time."""
    calls = itertools.count(1)
    return lambda: release() if next(calls) == count else None
