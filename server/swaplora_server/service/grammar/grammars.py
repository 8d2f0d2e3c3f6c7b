"""Grammars of clients, compiled once for all that ask for the same, off the event loop and off the engine's thread."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache, partial

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from swaplora_adapters.priority import lower_priority
from swaplora_server.engine.sampling.constraint import TokenBits, UnmetConstraintError, token_bits
from swaplora_server.service.errors import RequestError
from swaplora_server.service.grammar.mask_threads import Allowance, MaskThreads
from swaplora_server.service.grammar.matcher import GrammarConstraint, Mask, told
from swaplora_server.service.grammar.source import GrammarKind, GrammarSource
from swaplora_server.service.offload import GilTurns, Offload

NUM_THREADS = 2
MAX_SECONDS = 10.0  # for one grammar
MAX_KEPT = 256
MAX_KEPT_BYTES = 1 << 20  # of their texts: compiled they take up to a hundred times as much
_STACK_BYTES = 256 << 20  # a grammar of rules that each name the next is descended into rule by rule
# per mask some milliseconds, per sequence some megabytes, and a grammar is let go in a few milliseconds
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)


@dataclass(frozen=True)
class Grammar:
    """One that was compiled. Any number of sequences may keep to it."""

    matcher: LLMatcher
    first: Mask
    owner: "Grammars"

    def constraint(self, ends: frozenset[int]) -> GrammarConstraint:
        """The state of a new sequence, whose text one of `ends` may end. For the engine's thread."""
        owner = self.owner
        return GrammarConstraint(
            self.matcher.deep_copy(), self.first, owner.vocab_size, owner.bits(ends), owner.allowance, owner.threads
        )


class Grammars:
    """Compiles, and keeps what was asked for lately. `grammar` belongs to the event loop."""

    def __init__(self, tokenizer: LLTokenizer, max_waiting: int, turns: GilTurns) -> None:
        """`tokenizer` is a `grammar_tokenizer`."""
        self.vocab_size = vocab_size = tokenizer.vocab_size - 1
        self.allowance = Allowance()
        self.threads = MaskThreads(tokenizer)
        self.turns = turns
        self.bits = lru_cache(MAX_KEPT)(partial(_bits, vocab_size))
        self._tokenizer = tokenizer
        self._offload = Offload(NUM_THREADS, max_waiting, "grammar", stack_bytes=_STACK_BYTES)
        self._kept: OrderedDict[tuple[GrammarKind, str], Grammar] = OrderedDict()

    async def grammar(self, source: GrammarSource) -> Grammar:
        """`source` compiled. Raises RequestError for one that cannot be kept to, or that takes too long."""
        key = source.kind, source.text
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        job = _Job(self._tokenizer, self.vocab_size, source, self)
        try:
            async with asyncio.timeout(MAX_SECONDS):
                grammar = await self._offload.do(len(source.text), job.run)
        except TimeoutError:
            raise job.too_long() from None
        self._keep(key, grammar)
        return grammar

    def close(self, seconds: float) -> None:
        """End the threads, and wait so long for what they have begun. For whoever has ended the engine."""
        self.threads.close(seconds)
        self._offload.join(seconds)

    def _keep(self, key: tuple[GrammarKind, str], grammar: Grammar) -> None:
        self._kept[key] = grammar
        while len(self._kept) > MAX_KEPT or sum(len(text) for _, text in self._kept) > MAX_KEPT_BYTES:
            self._kept.popitem(last=False)


class _Job:
    """One grammar to compile."""

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int, source: GrammarSource, owner: Grammars) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._source = source
        self._owner = owner
        self._has_begun = False

    def run(self) -> Grammar:
        """Raises RequestError."""
        self._has_begun = True
        try:
            written = self._source.written(self._owner.turns)
        except ValueError as error:
            raise self._refusal(told(str(error))) from error
        lower_priority()  # not before: what held the interpreter would be kept from going on, and others with it
        matcher = LLMatcher(self._tokenizer, written, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise self._refusal(f"cannot be kept to: {told(matcher.get_error())}")
        try:
            first = Mask(matcher, self._vocab_size)
        except UnmetConstraintError as error:
            raise self._refusal(str(error)) from error
        if not first.has_tokens:
            raise self._refusal("allows no text but the empty one")
        return Grammar(matcher, first, self._owner)

    def too_long(self) -> RequestError:
        """What the request is told that waited for it."""
        if self._has_begun:
            return self._refusal("takes too long to be compiled: make it smaller or simpler")
        return RequestError("overloaded", "too many grammars wait to be compiled; try again in a moment")

    def _refusal(self, words: str) -> RequestError:
        param = self._source.param
        return RequestError("invalid_request", f"{param} {words}", param)


def _bits(vocab_size: int, token_ids: frozenset[int]) -> TokenBits:
    return token_bits(token_ids, vocab_size)
