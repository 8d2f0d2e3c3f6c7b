"""Tokens that rows must not choose, since they are not among those that the request or its constraint allows."""

from collections.abc import Sequence as Rows
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from swaplora_server.engine.request import Request, Sequence
from swaplora_server.engine.sampling.constraint import WORD_BITS, TokenBits, token_bits


class AllowedTokens:
    """What each sequence allows next. The bits of a request's own list are made once."""

    def __init__(self) -> None:
        self._of_requests: WeakKeyDictionary[Request, TokenBits] = WeakKeyDictionary()

    def of(self, sequence: Sequence, vocab_size: int) -> TokenBits | None:
        """None where it allows all. Raises what its constraint raises, and ValueError for bits that do not fit."""
        own = self._of_request(sequence.request, vocab_size)
        if sequence.constraint is None:
            return own
        bits = sequence.constraint.allowed()
        if bits.shape != (-(-vocab_size // WORD_BITS),) or bits.dtype != np.int32:
            raise ValueError(f"a constraint allows {bits.dtype} words of shape {bits.shape} of {vocab_size} tokens")
        return bits if own is None else bits & own

    def _of_request(self, request: Request, vocab_size: int) -> TokenBits | None:
        if request.params.allowed_token_ids is None:
            return None
        bits = self._of_requests.get(request)
        if bits is None:
            bits = self._of_requests[request] = token_bits(request.params.allowed_token_ids, vocab_size)
        return bits


def forbid_others(logits: Tensor, rows: Tensor, allowed: Rows[TokenBits]) -> None:
    """Set to -inf, in these rows of `logits` [rows, vocab_size], every token that is not in its row of `allowed`."""
    words = torch.from_numpy(np.stack(allowed)).to(logits.device, non_blocking=True)
    bits = words.unsqueeze(-1) >> torch.arange(WORD_BITS, dtype=torch.int32, device=logits.device) & 1
    is_forbidden = bits.flatten(1)[:, : logits.shape[-1]] == 0
    logits[rows] = logits[rows].masked_fill_(is_forbidden, float("-inf"))
