"""A row's numbers in groups of neighbours, so that what is looked for in a whole row is looked for in two short ones.

Sums and maxima of groups take as long as reading does; torch's own argmax and topk of long rows are far slower.
"""

import torch
from torch import Tensor


def group_amax(x: Tensor, size: int) -> Tensor:
    """The largest of each `size` neighbours. x: [rows, vocab_size] -> [rows, groups]; the last group may be short."""
    body, tail = _parts(x, size)
    return body.amax(-1) if tail is None else torch.cat((body.amax(-1), tail.amax(-1, keepdim=True)), dim=-1)


def group_sum(x: Tensor, size: int) -> Tensor:
    """The sum of each `size` neighbours, as `group_amax`."""
    body, tail = _parts(x, size)
    return body.sum(-1) if tail is None else torch.cat((body.sum(-1), tail.sum(-1, keepdim=True)), dim=-1)


def members(groups: Tensor, size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Of groups [rows, n]: the places of their members [rows, n * size], and which of these lie within the row.

    A place beyond the row's end is its last place.
    """
    places = (groups.unsqueeze(-1) * size + torch.arange(size, device=groups.device)).flatten(1)
    return places.clamp(max=vocab_size - 1), places < vocab_size


def argmax(x: Tensor, size: int = 64) -> tuple[Tensor, Tensor]:
    """The largest number of each row [rows], and the first place where it stands. One NaN in a row is its largest."""
    of_groups = group_amax(x, size)
    group = of_groups.argmax(-1, keepdim=True)
    places, is_within = members(group, size, x.shape[-1])
    best = x.gather(1, places).masked_fill(~is_within, float("-inf")).argmax(-1, keepdim=True)
    return of_groups.gather(1, group).squeeze(-1), places.gather(1, best).squeeze(-1)


def _parts(x: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """The whole groups [rows, groups, size], and the numbers after them if there are any."""
    whole = x.shape[-1] // size * size
    groups = x[:, :whole].view(len(x), whole // size, size)
    return groups, x[:, whole:] if whole < x.shape[-1] else None
