"""The exponential numbers of a draw: a function of a seed, a sequence's index and a token's position. Imports no torch.

The same to the last bit on every machine: integers first, then nothing but additions, multiplications and divisions of
doubles, which IEEE 754 rounds in one way. A library's logarithm is rounded in several.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swaplora_server.engine.sampling.philox import Words, philox

_WORD = 0xFFFFFFFF
_LOG_2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_SERIES = tuple(2.0 / power for power in range(19, 0, -2))  # of log((1 + s) / (1 - s)) in odd powers of s


class DrawKey(NamedTuple):
    """All that the random numbers of one draw depend on."""

    seed: int  # the request's, 64 bits
    sequence: int  # which of the request's
    position: int  # of the token, among those that it generates


def exponentials(keys: Sequence[DrawKey], count: int) -> NDArray[np.float32]:
    """[len(keys), count] independent numbers of the exponential distribution with rate 1, none of them 0."""
    counters = np.zeros((4, len(keys), -(-count // 4)), np.uint64)
    counters[0] = np.arange(counters.shape[-1])
    counters[1] = np.array([[key.position] for key in keys])
    counters[2] = np.array([[key.sequence] for key in keys])
    seeds = np.array([(key.seed & _WORD, key.seed >> 32 & _WORD) for key in keys], np.uint64).T
    words = philox(counters, seeds).transpose(1, 2, 0).reshape(len(keys), -1)
    return minus_log(words[:, :count]).astype(np.float32)


def minus_log(words: Words) -> NDArray[np.float64]:
    """-log of the numbers (word + 1/2) / 2^32, which lie strictly between 0 and 1."""
    mantissa, exponent = np.frexp(words + 0.5)  # of doubles, which hold a word and a half
    is_small = mantissa < _SQRT_HALF
    mantissa, exponent = np.where(is_small, mantissa * 2.0, mantissa), exponent - is_small
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = np.full_like(s, _SERIES[0])
    for coefficient in _SERIES[1:]:
        series = series * square + coefficient
    result: NDArray[np.float64] = (32.0 - exponent) * _LOG_2 - series * s
    return result
