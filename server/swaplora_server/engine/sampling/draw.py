"""One token of each row of probabilities, drawn by exponential races: argmax p/e, e ~ Exp(1), is distributed as p.

The race is run twice, among groups of tokens and then within the one that won. The outcome has the same distribution
(a group wins as often as the sum of its probabilities says, and a token within it by its share of that sum), and a row
needs some hundreds of random numbers where it has a hundred thousand tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from swaplora_server.engine.sampling.groups import group_sum, members
from swaplora_server.engine.sampling.noise import DrawKey, exponentials

_GROUP = 256


def noise_of(keys: Sequence[DrawKey], vocab_size: int) -> NDArray[np.float32]:
    """What a draw of each of these takes, [len(keys), n]."""
    return exponentials(keys, _GROUP + -(-vocab_size // _GROUP))


def draw(probs: Tensor, noise: Tensor) -> Tensor:
    """One place of each row, [rows]. probs: [rows, vocab_size], not below 0; a row need not sum to 1, but not to 0.

    noise: as `noise_of` has it.
    """
    group = _winner(group_sum(probs, _GROUP), noise[:, _GROUP:])
    places, is_within = members(group, _GROUP, probs.shape[-1])
    within = probs.gather(1, places).masked_fill(~is_within, 0.0)
    return places.gather(1, _winner(within, noise[:, :_GROUP])).squeeze(-1)


def _winner(masses: Tensor, noise: Tensor) -> Tensor:
    """Where the race of each row is won, [rows, 1]. The largest mass is made 1 first, lest tiny ones become 0."""
    return (masses / masses.amax(-1, keepdim=True) / noise).argmax(-1, keepdim=True)
