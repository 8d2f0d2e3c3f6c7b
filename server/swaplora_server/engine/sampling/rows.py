"""What each row of a step asks for beside the likeliest token of the model's own logits."""

from dataclasses import dataclass
from enum import IntEnum

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


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence, the number of its row among the logits, and the tokens that it allows next: None for all."""

    number: int
    sequence: Sequence
    allowed: TokenBits | None

    @property
    def params(self) -> SamplingParams:
        return self.sequence.request.params

    @property
    def kind(self) -> Kind:
        params = self.params
        if params.is_greedy:
            return Kind.GREEDY
        if params.top_k or params.top_p < 1.0:
            return Kind.LIKELIEST_AND_PROBABLE if params.min_p else Kind.LIKELIEST
        return Kind.PROBABLE if params.min_p else Kind.DRAWN

    @property
    def is_shaped(self) -> bool:
        """Whether its logits are changed before its token is found."""
        return self.allowed is not None or self.is_biased or self.params.is_penalised

    @property
    def is_biased(self) -> bool:
        return bool(self.params.logit_bias) or self.sequence.must_go_on

    @property
    def draw_key(self) -> DrawKey:
        """All that its draw depends on, beside its own probabilities."""
        return DrawKey(self.sequence.request.draw_seed, self.sequence.index, self.sequence.num_generated)
