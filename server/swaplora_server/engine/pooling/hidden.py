"""Last hidden states: what a decoder's layers and its last norm leave of a row, before the output head reads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor, nn

from swaplora_server.engine.request import Vector
from swaplora_server.engine.scheduler import Batch
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


def wanted_vectors(states: Tensor, batch: Batch) -> list[Vector | None]:
    """The last hidden state of each of the batch's rows that want it, in order; None for one that is not finite.

    states: [num_rows, hidden_size].
    """
    stops = accumulate(rows.num_rows for rows in batch.rows)
    last_rows = [stop - 1 for stop, rows in zip(stops, batch.rows, strict=True) if rows.wants is Wants.HIDDEN]
    vectors: Vector = states[last_rows].float().cpu().numpy()
    return [vector if np.isfinite(vector).all() else None for vector in vectors]
