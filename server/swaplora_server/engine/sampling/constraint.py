"""What may come next of a sequence, as a set of token ids in bits. Imports no torch."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32
TokenBits = NDArray[np.int32]  # ceil(vocab_size / 32) words; token t is bit t % 32 of word t // 32, as xgrammar has it


class UnmetConstraintError(Exception):
    """What a request asks its tokens to keep to cannot be kept. Its words are for the client."""


class ConstraintPendingError(Exception):
    """It is not known yet what may come next, or that nothing may: the sequence has no token in this step."""


class Constraint(Protocol):
    """The state of what one sequence must keep to, such as a grammar. It is the sequence's own, and knows its tokens.

    What it raises ends the request of its sequence, and that alone.
    """

    @property
    def is_busy(self) -> bool:
        """Whether it is finding out what may come next: until it has, its sequence need not be run."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing may come after the tokens that it knows: its sequence has ended."""

    def forced(self) -> int | None:
        """The only token that may come next, where that is known now and the sequence may not end instead."""

    def allowed(self) -> TokenBits:
        """The tokens that may come next. Raises ConstraintPendingError in a step that is to go without one."""

    def append(self, token_id: int) -> None:
        """Take note of the sequence's next token."""


def token_bits(token_ids: Iterable[int], vocab_size: int) -> TokenBits:
    """The set of these ids, all of them below `vocab_size`."""
    is_in = np.zeros(-(-vocab_size // WORD_BITS) * WORD_BITS, np.uint8)
    is_in[list(token_ids)] = 1
    return np.packbits(is_in, bitorder="little").view("<i4").astype(np.int32)
