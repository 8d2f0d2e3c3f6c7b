"""One token of each row of probabilities, drawn by exponential races: argmax p/e, e ~ Exp(1), is distributed as p.

The race is run twice, among groups of tokens and then within the one that won. The outcome has the same distribution
(a group wins as often as the sum of its probabilities says, and a token within it by its share of that sum), and a row
needs some hundreds of random numbers where it has a hundred thousand tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from swaplora_server.engine.sampling.groups import group_sum, members
from swaplora_server.engine.sampling.noise import DrawKey, exponentials
from swaplora_server.engine.sampling.transfers import send_tensor

_GROUP = 256


def draw(probs: Tensor, keys: Sequence[DrawKey]) -> Tensor:
    """One place of each row, [rows]. probs: [rows, vocab_size], not below 0; a row need not sum to 1, but not to 0."""
    of_groups = group_sum(probs, _GROUP)
    noise = send_tensor(torch.from_numpy(exponentials(keys, _GROUP + of_groups.shape[-1])), probs.device)
    group = _winner(of_groups, noise[:, _GROUP:])
    places, is_within = members(group, _GROUP, probs.shape[-1])
    within = probs.gather(1, places).masked_fill(~is_within, 0.0)
    return places.gather(1, _winner(within, noise[:, :_GROUP])).squeeze(-1)


def _winner(masses: Tensor, noise: Tensor) -> Tensor:
    """Where the race of each row is won, [rows, 1]. The largest mass is made 1 first, lest tiny ones become 0."""
    return (masses / masses.amax(-1, keepdim=True) / noise).argmax(-1, keepdim=True)
