"""What each row of a step asks for beside the likeliest token of the model's own logits."""

from enum import IntEnum
from typing import NamedTuple

from swaplora_server.engine.request import SamplingParams, Sequence
from swaplora_server.engine.sampling.constraint import TokenBits
from swaplora_server.engine.sampling.noise import DrawKey


class Kind(IntEnum):
    """How a row's token is found. Rows in this order lie side by side where they ask for the same filters."""

    GREEDY = 0
    LIKELIEST = 1  # drawn, with top_k or top_p
    LIKELIEST_AND_PROBABLE = 2
    PROBABLE = 3  # drawn, with min_p
    DRAWN = 4


class Row(NamedTuple):
    """A sequence, the number of its row among the logits, and the tokens that it allows next: None for all."""

    number: int
    sequence: Sequence
    allowed: TokenBits | None
    kind: Kind
    is_shaped: bool  # whether its logits are changed before its token is found

    @property
    def params(self) -> SamplingParams:
        return self.sequence.request.params

    @property
    def is_drawn(self) -> bool:
        """Whether its token is drawn by the model's own logits."""
        return self.kind is not Kind.GREEDY and not self.is_shaped

    @property
    def draw_key(self) -> DrawKey:
        """All that its draw depends on, beside its own probabilities."""
        return DrawKey(self.sequence.request.draw_seed, self.sequence.index, self.sequence.num_generated)


def row_of(number: int, sequence: Sequence, allowed: TokenBits | None) -> Row:
    """The row of a sequence."""
    params = sequence.request.params
    is_shaped = allowed is not None or bool(params.logit_bias) or params.is_penalised or sequence.must_go_on
    return Row(number, sequence, allowed, _kind(params), is_shaped)


def _kind(params: SamplingParams) -> Kind:
    if params.is_greedy:
        return Kind.GREEDY
    if params.top_k or params.top_p < 1.0:
        return Kind.LIKELIEST_AND_PROBABLE if params.min_p else Kind.LIKELIEST
    return Kind.PROBABLE if params.min_p else Kind.DRAWN
