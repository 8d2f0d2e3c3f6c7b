"""A sequence's own state of a grammar, and what the grammar allows next."""

import re
import time
from collections.abc import Callable

import numpy as np
from llguidance import LLMatcher

from swaplora_server.engine.sampling.constraint import (
    WORD_BITS,
    ConstraintPendingError,
    TokenBits,
    UnmetConstraintError,
)
from swaplora_server.service.grammar.mask_threads import SLOW_SECONDS, Allowance, MaskThreads

_MAX_REASON = 300
_OF_SCHEMA = re.compile(r"at \d+\(\d+\): failed to compile JSON schema: (.*)")


class Mask:
    """What may come next: tokens, and perhaps the end."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        """Computes it. Raises UnmetConstraintError where the grammar cannot be followed any further."""
        began = time.thread_time()
        words = np.empty(vocab_size // WORD_BITS + 1, np.int32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self.seconds = time.thread_time() - began
        is_failed = matcher.is_error()
        end = np.int32(np.uint32(1 << vocab_size % WORD_BITS).view(np.int32))
        self.may_end = not is_failed and bool(words[-1] & end)
        words[-1] &= ~end
        self.tokens: TokenBits = words[: -(-vocab_size // WORD_BITS)]
        self.has_tokens = not is_failed and bool(self.tokens.any())
        self.only = None if self.may_end else _only(self.tokens)
        if is_failed or not (self.has_tokens or self.may_end):
            raise UnmetConstraintError(f"the grammar cannot be followed: {reason_of(matcher)}")


class GrammarConstraint:
    """A `Constraint` to a grammar. Belongs to the engine's thread, but while it is busy.

    What takes long, by the last time, is done elsewhere, and so is all for which the engine's thread has no time left.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        first: Mask,
        vocab_size: int,
        ends: TokenBits,
        allowance: Allowance,
        threads: MaskThreads,
    ) -> None:
        """`first` is what may come first; `ends` are the tokens that may come where the text may end."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = ends
        self._allowance = allowance
        self._threads = threads
        self._seconds = first.seconds  # that the last token took
        self._unread: int | None = None  # the newest token, while the matcher does not know it
        self._allowed: TokenBits | None = None
        self._only: int | None = None
        self._failure: Exception | None = None
        self.is_busy = False
        self.is_complete = False
        self._take(first)

    def forced(self) -> int | None:
        self._find_out()
        return None if self._allowed is None or self.is_complete else self._only

    def allowed(self) -> TokenBits:
        self._find_out()
        if self._failure is not None:
            raise self._failure
        if self._allowed is None or self.is_complete:
            raise ConstraintPendingError
        return self._allowed

    def _find_out(self) -> None:
        if self._allowed is None and self._may_go_on:
            self._do_here(self._compute)

    def append(self, token_id: int) -> None:
        """Take note of the next token; one that ends the text is none of the grammar's."""
        if self._is_end(token_id):
            return
        self._unread, self._allowed = token_id, None
        if self._seconds >= SLOW_SECONDS or not self._allowance.is_left:
            self._hand_over()
        else:
            self._seconds = 0.0
            self._do_here(self._read)

    @property
    def _may_go_on(self) -> bool:
        """Whether the mask is to be computed now: what cannot be done here is handed over."""
        is_idle = not self.is_busy and self._failure is None and not self.is_complete
        if is_idle and not self._allowance.is_left:
            self._hand_over()
        return is_idle and not self.is_busy

    def _is_end(self, token_id: int) -> bool:
        return bool(int(self._ends[token_id // WORD_BITS]) >> token_id % WORD_BITS & 1)

    def _do_here(self, work: Callable[[], None]) -> None:
        before = self._seconds
        self._measured(work)
        self._allowance.spend(self._seconds - before)

    def _hand_over(self) -> None:
        self.is_busy = True
        self._threads.do(self._seconds, self._catch_up)

    def _catch_up(self) -> None:
        """On another thread; is_busy goes last, since the engine's thread looks at it first."""
        self._seconds = 0.0
        self._measured(self._read_beside_others)
        if not self.is_complete and self._failure is None:
            self._measured(self._compute)
        self.is_busy = False

    def _measured(self, work: Callable[[], None]) -> None:
        """Of the processor's time, since a thread that waits for its turn costs nobody."""
        began = time.thread_time()
        try:
            work()
        except Exception as error:  # noqa: BLE001 - raised where the sequence is asked for its next token
            self._failure = error
        self._seconds += time.thread_time() - began

    def _read(self) -> None:
        if self._unread is not None:
            self._note(self._matcher.consume_token(self._unread))

    def _read_beside_others(self) -> None:
        if self._unread is not None:
            self._note(self._threads.consume(self._matcher, self._unread))

    def _note(self, is_consumed: bool) -> None:
        if not is_consumed:
            raise UnmetConstraintError(f"the grammar cannot be followed: {reason_of(self._matcher)}")
        self._unread = None
        self.is_complete = self._matcher.is_stopped()

    def _compute(self) -> None:
        self._take(Mask(self._matcher, self._vocab_size))

    def _take(self, mask: Mask) -> None:
        self.is_complete = not mask.has_tokens
        self._only = mask.only
        self._allowed = mask.tokens | self._ends if mask.may_end else mask.tokens


def _only(tokens: TokenBits) -> int | None:
    """The one token in a set, if there is no more."""
    [words] = tokens.nonzero()
    if len(words) != 1:
        return None
    bits = int(tokens[words[0]]) & (2**WORD_BITS - 1)
    return int(words[0]) * WORD_BITS + bits.bit_length() - 1 if bits.bit_count() == 1 else None


def reason_of(matcher: LLMatcher) -> str:
    """Why it cannot go on, in a line, without the grammar's own text."""
    return told(matcher.get_error() or matcher.stop_reason())


def told(error: str) -> str:
    """What llguidance says is wrong, in a line: of a regular expression or a schema what its own parser says."""
    of_schema = _OF_SCHEMA.match(error)
    error = (of_schema[1] if of_schema else error).partition("\n<")[0]
    _, _, of_expression = error.partition("\nerror: ")
    words = " ".join((of_expression.partition("\n")[0] or error).partition(". Enable ")[0].split())
    return words[:_MAX_REASON]
