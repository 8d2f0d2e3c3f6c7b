"""What is added to single logits: a request's logit_bias, and -inf for what would end a sequence too early."""

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from swaplora_server.engine.request import Request, Sequence
from swaplora_server.engine.sampling.transfers import Outgoing, Sent

Addition = tuple[NDArray[np.int64], NDArray[np.float32]]  # token ids, and what is added to the logit of each


class Added(NamedTuple):
    """What is added, and where: [n] each."""

    rows: Sent
    token_ids: Sent
    values: Sent

    def to(self, logits: Tensor) -> None:
        """Add it to `logits` [rows, vocab_size]."""
        logits.index_put_((self.rows.tensor, self.token_ids.tensor), self.values.tensor, accumulate=True)


class Biases:
    """What the requests that ask for it have added to their logits. It is made an array once for each."""

    def __init__(self) -> None:
        self._biases: WeakKeyDictionary[Request, Addition] = WeakKeyDictionary()
        self._ends: WeakKeyDictionary[Request, Addition] = WeakKeyDictionary()

    def put(self, sequences: Rows[Sequence], outgoing: Outgoing) -> Added | None:
        """What the sequence of each row asks for; None where none asks."""
        added = [(row, addition) for row, sequence in enumerate(sequences) for addition in self._of(sequence)]
        if not added:
            return None
        rows = np.repeat([row for row, _ in added], [len(token_ids) for _, (token_ids, _) in added])
        token_ids, values = (np.concatenate(parts) for parts in zip(*(addition for _, addition in added), strict=True))
        return Added(outgoing.put(rows), outgoing.put(token_ids), outgoing.put(values))

    def _of(self, sequence: Sequence) -> Iterable[Addition]:
        request = sequence.request
        if request.params.logit_bias:
            if request not in self._biases:
                self._biases[request] = _addition(request.params.logit_bias)
            yield self._biases[request]
        if sequence.must_go_on:
            if request not in self._ends:
                ends = sorted(request.params.stop_token_ids)
                self._ends[request] = _addition([(token_id, float("-inf")) for token_id in ends])
            yield self._ends[request]


def _addition(pairs: Rows[tuple[int, float]]) -> Addition:
    token_ids, values = zip(*pairs, strict=True)
    return np.array(token_ids, np.int64), np.array(values, np.float32)
