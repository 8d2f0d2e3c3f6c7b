"""Last hidden states: what a model's layers and its last norm leave of a row, and what requests read of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swaplora_server.engine.pooling.kinds import InputStates, Reader
from swaplora_server.engine.request import Vector
from swaplora_server.engine.scheduling.batch import Batch, ScheduledRows
from swaplora_server.kernels.step import Wants


@contextmanager
def noting_hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """While it is open, each forward of a causal language model adds its last hidden states [num_rows, hidden_size].

    Those of rows that reach no output head may be of any value: fused layers leave them out.
    """
    decoder: Any = model.base_model
    noted: list[Tensor] = []

    def note(_decoder: nn.Module, _inputs: object, output: Any) -> None:
        noted.append(output.last_hidden_state[0])

    handle = decoder.register_forward_hook(note)
    try:
        yield noted
    finally:
        handle.remove()


def read_last(states: Tensor, batch: Batch) -> list[Vector | None]:
    """What each request that wants hidden states reads of the last of its rows, in order.

    states: [num_rows, hidden_size]. None for what is not finite.
    """
    stops = accumulate(rows.num_rows for rows in batch.rows)
    ends = [(rows, InputStates(states[stop - 1 : stop])) for rows, stop in zip(batch.rows, stops, strict=True)]
    return _read(ends)


def read_whole(states: Tensor, pooled: Tensor | None, batch: Batch) -> list[Vector | None]:
    """The same of all of its rows, which are its whole input. pooled: [num_inputs, hidden_size]."""
    parts = torch.split(states, [rows.num_rows for rows in batch.rows])
    of_inputs = repeat(None) if pooled is None else iter(pooled)
    return _read([(rows, InputStates(part, next(of_inputs))) for rows, part in zip(batch.rows, parts, strict=True)])


def _read(given: Sequence[tuple[ScheduledRows, InputStates]]) -> list[Vector | None]:
    """By each reader at once, and brought to the host together."""
    wanted = [
        (reads, one)
        for rows, one in given
        if rows.wants is Wants.HIDDEN and (reads := rows.sequence.request.reads) is not None
    ]
    if not wanted:
        return []
    by_reader: dict[Reader, list[int]] = {}
    for place, (reads, _) in enumerate(wanted):
        by_reader.setdefault(reads, []).append(place)
    found: dict[int, Tensor] = {}
    for reads, places in by_reader.items():
        found |= zip(places, reads([wanted[place][1] for place in places]), strict=True)
    read = [found[place] for place in range(len(wanted))]
    numbers: Vector = torch.cat([part.float().reshape(-1) for part in read]).cpu().numpy()
    ends = np.cumsum([part.numel() for part in read])[:-1]
    vectors = [part.reshape(own.shape) for part, own in zip(np.split(numbers, ends), read, strict=True)]
    return [vector if np.isfinite(vector).all() else None for vector in vectors]
