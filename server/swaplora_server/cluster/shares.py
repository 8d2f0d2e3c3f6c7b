"""Which share of the requests each adapter has had lately."""

import math

_SECONDS = 60.0  # a request counts for 1/e of a new one after so long
_MOST_NAMES = 32_768
_GROWN = 1e9  # when counts are written anew in units of now
_FORGOTTEN = 30 * _SECONDS  # what counted then is worth nothing, and weights would overflow some time after


class Shares:
    """Counts that decay with time, all at once: a request adds what grows with time instead (forward decay).

    Cormode et al., "Forward decay: a practical time decay model for streaming systems", 2009.
    """

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._total = 0.0
        self._since: float | None = None

    def add(self, names: tuple[str, ...], now: float) -> None:
        """One request, for all of these or for none; `now` in seconds."""
        weight = self._weight(now)
        self._total += weight
        for name in names:
            self._counts[name] = self._counts.get(name, 0.0) + weight
        if weight > _GROWN or len(self._counts) > _MOST_NAMES:
            self._rewrite(now)

    def of(self, name: str, now: float) -> float:
        """Between 0 and 1: of what was counted a standard deviation less, so that one request is no share yet."""
        weight = self._weight(now)
        counted = self._counts.get(name, 0.0) / weight
        return max(0.0, counted - math.sqrt(counted)) * weight / self._total if counted else 0.0

    def _weight(self, now: float) -> float:
        if self._since is None or now - self._since > _FORGOTTEN:
            self._counts, self._total, self._since = {}, 0.0, now
        return math.exp((now - self._since) / _SECONDS)

    def _rewrite(self, now: float) -> None:
        """In units of now, and without what counts for next to nothing; of very many names, without half of them."""
        weight = self._weight(now)
        kept = sorted(((count / weight, name) for name, count in self._counts.items()), reverse=True)
        self._counts = {name: count for count, name in kept[: _MOST_NAMES // 2] if count > 1e-3}
        self._total /= weight
        self._since = now
