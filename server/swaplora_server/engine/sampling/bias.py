"""What is added to single logits: a request's logit_bias, and -inf for what would end a sequence too early."""

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from swaplora_server.engine.request import Request, Sequence
from swaplora_server.engine.sampling.transfers import send, send_tensor

Addition = tuple[Tensor, Tensor]  # token ids, and what is added to the logit of each


class Biases:
    """What the requests that ask for it have added to their logits. It is made a tensor once for each."""

    def __init__(self) -> None:
        self._biases: WeakKeyDictionary[Request, Addition] = WeakKeyDictionary()
        self._ends: WeakKeyDictionary[Request, Addition] = WeakKeyDictionary()

    def add_to(self, logits: Tensor, sequences: Rows[Sequence]) -> None:
        """Add to `logits` [rows, vocab_size] what the sequence of each row asks for."""
        added = [(row, addition) for row, sequence in enumerate(sequences) for addition in self._of(sequence, logits)]
        if added:
            counts = torch.tensor([len(token_ids) for _, (token_ids, _) in added])
            rows = torch.tensor([row for row, _ in added]).repeat_interleave(counts)
            places = send_tensor(rows, logits.device)
            token_ids, values = (torch.cat(parts) for parts in zip(*(addition for _, addition in added), strict=True))
            logits.index_put_((places, token_ids), values, accumulate=True)

    def _of(self, sequence: Sequence, like: Tensor) -> Iterable[Addition]:
        request = sequence.request
        if request.params.logit_bias:
            if request not in self._biases:
                self._biases[request] = _addition(request.params.logit_bias, like)
            yield self._biases[request]
        if sequence.must_go_on:
            if request not in self._ends:
                ends = sorted(request.params.stop_token_ids)
                self._ends[request] = _addition([(token_id, float("-inf")) for token_id in ends], like)
            yield self._ends[request]


def _addition(pairs: Rows[tuple[int, float]], like: Tensor) -> Addition:
    token_ids, values = zip(*pairs, strict=True)
    return send(token_ids, torch.int64, like.device), send(values, like.dtype, like.device)
