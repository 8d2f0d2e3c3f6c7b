"""Philox 4x32-10, a generator that is a function of a counter and a key. Imports no torch.

From Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. It has no state to keep,
and as all of it is arithmetic of integers its numbers are the same on every machine.
"""

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 10
_WORD = np.uint64(0xFFFFFFFF)
_BITS = np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
Words = NDArray[np.uint64]  # each below 2^32: a product of two needs the room


def philox(counters: Words, keys: Words) -> Words:
    """Four random words [4, rows, blocks] for each counter of four words [4, rows, blocks] and key of two [2, rows]."""
    even, odd = counters[::2], counters[1::2]
    multipliers, weyl, keys = _MULTIPLIERS[:, None, None], _WEYL[:, None, None], keys[..., None]
    for number in range(_NUM_ROUNDS):
        products = even * multipliers
        even = (products[::-1] >> _BITS) ^ odd ^ (keys + np.uint64(number) * weyl & _WORD)
        odd = products[::-1] & _WORD
    return np.stack((even[0], odd[0], even[1], odd[1]))
