"""A request as the engine knows it: token ids in, token events out. Imports no torch, knows no HTTP and no text."""

import enum
import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import structlog
from numpy.typing import NDArray

from swaplora_server.engine.block_keys import block_key, invoked_key, root_key
from swaplora_server.engine.sampling.constraint import Constraint

if TYPE_CHECKING:
    from swaplora_adapters.weights.router import Route, Trace
    from swaplora_adapters.weights.served import AdapterWeights
    from swaplora_server.engine.pooling.kinds import Reader


Vector = NDArray[np.float32]


class FinishReason(enum.StrEnum):
    """Why a sequence ended. Every sequence ends exactly once."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


_log = structlog.get_logger(__name__)

# what is told of a request that was not done by its deadline
OVERDUE, OVERDUE_CODE = "the time that the request was given has passed", "deadline_exceeded"
LAST_PRIORITY = 2**31 - 1  # behind all other requests, whoever's
# a temperature beneath this is greedy in the limit, and too small to divide by
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 do not filter.

    With max_tokens 0 nothing is generated: the prompt is only computed. Penalties of 0, and a repetition_penalty of 1,
    change nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None  # None: none wanted; k: the chosen token's and the k likeliest
    num_prompt_logprobs: int | None = None  # the same, of the prompt's own tokens
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids, and what is added to the logit of each
    allowed_token_ids: frozenset[int] | None = None  # None: all of them

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW

    @property
    def is_penalised(self) -> bool:
        """Whether tokens that were there before become less likely, or more."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    def may_end_at(self, number: int) -> bool:
        """Whether its `number`th token may end a sequence, by itself or with a stop string: `min_tokens` go first."""
        return number > self.min_tokens


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities at one position, of the model's own distribution (before temperature and filters)."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first
    rank: int = 0  # of the chosen token, 1 for the likeliest; counted for tokens of prompts alone


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of one sequence: a token, an end, or both. When it ended in an error, the client reads the last two."""

    index: int
    token_id: int | None = None
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    error: str = ""
    error_code: str = "engine_failed"


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One term of a request's sum of adapters, or a member of its mixture.

    The weights are those of the version that was leased at admission.
    """

    weights: "AdapterWeights"
    scale: float
    digest: str
    route: "Route | None" = None

    @property
    def key(self) -> str:
        """What is added alike, but for its scale, has the same."""
        return self.digest if self.route is None else f"{self.digest} by {self.route.router.key}"


@dataclass(eq=False)
class Request:
    """Something to generate. On the engine's thread, `emit` receives every event, and `release` is called once.

    Where log-probabilities of its prompt are wanted, they are in `scores` before `emit` hears of a token, or of an end
    that is no error: one of each of its tokens but the first, which nothing foretells. With max_tokens 0 nothing is
    generated, and what it `reads` of its prompt's last hidden state, of an encoder's of all of them, is in `hidden`.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    emit: Callable[[TokenEvent], None]
    adapters: tuple[AdapterUse, ...] = ()
    num_sequences: int = 1
    release: Callable[[], None] = lambda: None
    cache_salt: str | None = None  # only requests with the same salt share cached blocks
    tenant: str = ""  # whose it is: what there is, is shared between tenants first
    priority: int = 0  # among the tenant's own: the lower goes first
    deadline: float | None = None  # on the monotonic clock: then it ends, however far it has come
    invoked_at: int = 0  # the token of the prompt from which on its adapter applies; the base computes those before
    new_constraint: Callable[[], Constraint] | None = None  # what each of its sequences must keep to
    scores: list[Logprobs] = field(default_factory=list)
    reads: "Reader | None" = None
    token_types: tuple[int, ...] | None = None  # of each token of an encoder's input, the segment that it is of
    hidden: Vector | None = field(default=None, init=False)
    _unfinished: set[int] = field(init=False)  # sequences, by index
    _num_finished: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1), init=False)
    num_cached_tokens: int | None = field(default=None, init=False)  # of the prompt; None until it is looked up
    begun_at: float | None = field(default=None, init=False)  # on the monotonic clock: when the first sequence did
    _held: list[TokenEvent] = field(default_factory=list, init=False)  # until its prompt's scores are there
    _has_first_ended: bool = field(default=False, init=False)  # of its sequences

    def __post_init__(self) -> None:
        self._unfinished = set(range(self.num_sequences))

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    @cached_property
    def draw_seed(self) -> int:
        """What its random numbers follow from: 64 bits, drawn at random where it gives no seed."""
        return secrets.randbits(64) if self.params.seed is None else self.params.seed

    @property
    def num_unscored(self) -> int:
        """Tokens of the prompt whose log-probabilities are wanted and not there yet."""
        is_wanted = self.params.num_prompt_logprobs is not None
        return len(self.prompt_ids) - 1 - len(self.scores) if is_wanted else 0

    def tell(self, event: TokenEvent) -> None:
        """Emit `event`, or hold it back as long as scores of the prompt are to come, which the first sequence makes."""
        self._held.append(event)
        self._has_first_ended |= event.index == 0 and event.finish_reason is not None
        if self._has_first_ended or not self.num_unscored:
            told, self._held = self._held, []
            for one in told:
                self.emit(one)

    def finish(self, event: TokenEvent) -> None:
        """Say how one of its sequences ended, and call `release` after the last. What these raise ends nothing else.

        The first end of a sequence is the one that counts: `give_up` may come between, on another thread.
        """
        if self._end(event.index):
            self._call(partial(self.tell, event))

    def give_up(self, message: str, code: str) -> None:
        """End what is unfinished with an error, on any thread, whatever the engine's is at."""
        for index in sorted(self._unfinished.copy()):
            if self._end(index):
                self._call(partial(self.emit, TokenEvent(index, None, None, FinishReason.ERROR, message, code)))

    def _end(self, index: int) -> bool:
        """Whether nobody else has ended it. Each of the two steps is taken once, however threads interleave."""
        try:
            self._unfinished.remove(index)
        except KeyError:
            return False
        if next(self._num_finished) == self.num_sequences:
            self._call(self.release)
        return True

    def _call(self, told: Callable[[], None]) -> None:
        try:
            told()
        except Exception:  # noqa: BLE001 - the engine's boundary to who asked
            _log.exception("a request could not be told of its end", request=self.request_id)

    @cached_property
    def adapter_key(self) -> tuple[tuple[str, float], ...]:
        """Equal for requests whose rows can share a segment; empty for the base, which sorts first."""
        return tuple((use.key, use.scale) for use in self.adapters)

    @cached_property
    def trace(self) -> "Trace | None":
        """Who is shown what its rows take of the members of its mixture."""
        return next((use.route.router.trace for use in self.adapters if use.route is not None), None)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Of its adapters, whatever their scales."""
        return tuple(use.digest for use in self.adapters)

    @cached_property
    def line(self) -> tuple[str, tuple[str, ...]]:
        """Equal for the requests of one tenant for the same adapters, which wait in one line."""
        return self.tenant, self.digests

    @cached_property
    def adapter_ranks(self) -> dict[str, int]:
        """The largest rank of each of its adapters, by digest."""
        return {use.digest: use.weights.rank for use in self.adapters}

    @cached_property
    def cache_root(self) -> bytes:
        """Where the keys of its cached blocks begin."""
        return root_key(() if self.invoked_at else self.adapter_key, self.cache_salt)

    def block_parent(self, parent: bytes, start: int, stop: int) -> bytes:
        """The key that a block of tokens [start, stop) comes after, where the one before it has key `parent`.

        Blocks of the base are shared until the one in which the adapter is invoked.
        """
        if start <= self.invoked_at < stop and self.invoked_at:
            return invoked_key(parent, root_key(self.adapter_key, self.cache_salt), self.invoked_at)
        return parent


_arrivals = itertools.count()


@dataclass(eq=False)
class Sequence:
    """One of a request's continuations: its tokens so far, how many of them are in the KV cache, and where."""

    request: Request
    index: int
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    arrival: int = field(default_factory=lambda: next(_arrivals))
    awaited_key: bytes | None = None  # of a block that another sequence was computing when this one was looked at
    passed_over_since: int | None = None  # the step in which it first had to let others go before it
    has_lacked_ranks: bool = False  # since it last waited
    lacking_since: int | None = None  # the step in which there were first too few blocks for it
    num_lacking: int = 0  # how many it takes, as it last turned out
    begun_in: int | None = None  # the step in which it last began
    num_tokens_before: int = 0  # how many it had then
    was_preempted: bool = False
    _block_keys: list[bytes] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def max_num_tokens(self) -> int:
        """What it may come to."""
        return len(self.request.prompt_ids) + self.request.params.max_tokens

    @property
    def num_generated(self) -> int:
        return self.num_tokens - len(self.request.prompt_ids)

    @property
    def num_unscored(self) -> int:
        """Tokens of its prompt that it has yet to make log-probabilities of. The first does for its siblings."""
        return 0 if self.index else self.request.num_unscored

    @property
    def num_scored(self) -> int:
        """Its first tokens that need not be computed for what they say of the next."""
        return self.num_tokens if not self.num_unscored else len(self.request.scores)

    @property
    def must_go_on(self) -> bool:
        """Whether its next token must not be one that ends it."""
        params = self.request.params
        return bool(params.stop_token_ids) and not params.may_end_at(self.num_generated + 1)

    @cached_property
    def constraint(self) -> Constraint | None:
        """What its tokens must keep to, of its own, made when it is first looked at."""
        return self.request.new_constraint and self.request.new_constraint()

    @property
    def is_held(self) -> bool:
        """Whether it need not be run yet, since it is being found out what may come next."""
        return self.constraint is not None and self.constraint.is_busy

    @property
    def is_complete(self) -> bool:
        """Whether what it must keep to lets nothing come next."""
        return self.constraint is not None and self.constraint.is_complete

    @property
    def forced(self) -> int | None:
        """Its next token, where nothing else can come and nobody asks how likely it was."""
        params = self.request.params
        if self.constraint is None or params.num_logprobs is not None or params.allowed_token_ids is not None:
            return None
        token_id = self.constraint.forced()
        return None if token_id in params.stop_token_ids else token_id

    @property
    def late_finish_reason(self) -> FinishReason | None:
        """Why it had ended already, now that what it keeps to has found that out."""
        if self.constraint is None:
            return None
        if self.is_complete:
            return FinishReason.STOP
        is_over = self.num_generated >= self.request.params.max_tokens and not self.is_held
        return FinishReason.LENGTH if is_over else None

    def generated_ids(self, start: int) -> list[int]:
        """The tokens that it has generated, from the `start`th on."""
        return self.token_ids[len(self.request.prompt_ids) + start :]

    def append(self, token_id: int) -> None:
        """Take its next token: the only way for one to get in."""
        self.token_ids.append(token_id)
        if self.constraint is not None:
            self.constraint.append(token_id)

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose keys and values are not in the cache yet: the rest of a prompt, or 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_tokens_since(self) -> int:
        """How many it has generated since it last began."""
        return self.num_tokens - self.num_tokens_before

    @property
    def is_recomputed(self) -> bool:
        """Whether it was preempted and has yet to come to a next token."""
        return self.was_preempted and self.num_uncomputed > 1

    @property
    def hashed_keys(self) -> list[bytes]:
        """Those of `block_keys` that were ever asked for."""
        return self._block_keys

    def block_keys(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Cache keys of its first `num_blocks` blocks, which its tokens must fill. Each is hashed once."""
        for start in range(len(self._block_keys) * block_size, num_blocks * block_size, block_size):
            stop = start + block_size
            parent = self._block_keys[-1] if start else self.request.cache_root
            parent = self.request.block_parent(parent, start, stop)
            self._block_keys.append(block_key(parent, self.token_ids[start:stop]))
        return self._block_keys[:num_blocks]

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """Why the sequence ends with `token_id`, its newest token, or None while it goes on.

        One that is held, or complete, has its end found out before its next step.
        """
        params = self.request.params
        if token_id in params.stop_token_ids and params.may_end_at(self.num_generated):
            return FinishReason.STOP
        if self.is_held or self.is_complete:
            return None
        if self.num_generated >= params.max_tokens:
            return FinishReason.LENGTH
        return None
