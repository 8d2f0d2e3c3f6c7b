"""How far a figure can be trusted: intervals of rates, and whether two differ on the same items."""

import math

Z = 1.959963984540054  # of 95 %
MAX_EXACT = 1000


def wilson_interval(mean: float, num: int) -> tuple[float, float]:
    """The 95 % score interval of a rate of `num` items (Wilson 1927, doi 10.1080/01621459.1927.10502953).

    Scores between 0 and 1 vary no more than a rate of the same mean does, so it is wide enough for theirs too. Raises
    ValueError for no items, and for a mean outside of 0 to 1.
    """
    if num < 1 or not 0 <= mean <= 1:
        raise ValueError("a rate is from 0 to 1, of one item or more")
    weight = Z * Z / num
    centre = (mean + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(mean * (1 - mean) / num + weight / (4 * num))
    return min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))


def mcnemar(num_only_first: int, num_only_second: int) -> float:
    """The two-sided p-value that two are equally often right, of the items that only one of them got right.

    The exact binomial test up to MAX_EXACT such items, above it McNemar's chi-squared with continuity correction
    (doi 10.1007/BF02295996).
    """
    num = num_only_first + num_only_second
    if num > MAX_EXACT:
        chi_squared = max(0, abs(num_only_first - num_only_second) - 1) ** 2 / num
        return math.erfc(math.sqrt(chi_squared / 2))
    tail = sum(math.comb(num, k) for k in range(min(num_only_first, num_only_second) + 1))
    return min(1.0, 2 * tail / (1 << num))
