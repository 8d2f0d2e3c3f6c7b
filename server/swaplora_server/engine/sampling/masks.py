"""Tokens that rows must not choose, since they are not among those that the request or its constraint allows."""

from collections.abc import Sequence as Rows
from functools import cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from swaplora_server.engine.request import Request, Sequence
from swaplora_server.engine.sampling.constraint import WORD_BITS, TokenBits, token_bits
from swaplora_server.engine.sampling.transfers import Outgoing, Sent


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


def put_allowed(allowed: Rows[TokenBits | None], vocab_size: int, outgoing: Outgoing) -> Sent | None:
    """The bits of all rows, as bytes; None where each allows all tokens, as a row of None does."""
    if all(row is None for row in allowed):
        return None
    everything = np.full(-(-vocab_size // WORD_BITS), -1, np.int32)
    words = np.concatenate([everything if row is None else row for row in allowed])
    return outgoing.put(words.view(np.uint8))


def forbid_others(logits: Tensor, allowed: Tensor) -> None:
    """Set to -inf, in each row of `logits` [rows, vocab_size], every token whose bit is not in `allowed`.

    A NaN stays one.
    """
    limits = torch.index_select(_limits_of_bytes(logits.device), 0, allowed.int()).view(len(logits), -1)
    logits.clamp_(max=limits[:, : logits.shape[-1]])


@cache
def _limits_of_bytes(device: torch.device) -> Tensor:
    """[256, 8]: how large the logits of eight tokens may be, by the byte that has their bits."""
    is_allowed = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(is_allowed, np.inf, -np.inf).astype(np.float32)).to(device)
