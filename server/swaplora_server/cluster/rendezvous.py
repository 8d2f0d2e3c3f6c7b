"""Where a key belongs: rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings", 1998)."""

import hashlib
from collections.abc import Iterable

_MOST_ORDERS = 16_384  # of 64 replicas each, 9 MB


class Rendezvous:
    """Members in an order of each key's own: any two of these with the same members agree on it.

    A member that goes leaves the order of the others as it was, and one that comes is inserted into it: so a key
    changes its first member only if that one goes, or a new one comes before it.
    """

    def __init__(self) -> None:
        self._members: tuple[str, ...] = ()
        self._orders: dict[str, tuple[str, ...]] = {}

    def set_members(self, members: Iterable[str]) -> None:
        chosen = tuple(sorted(members))
        if chosen != self._members:
            self._members = chosen
            self._orders.clear()

    def order(self, key: str) -> tuple[str, ...]:
        """All members, the key's own first."""
        found = self._orders.get(key)
        if found is None:
            if len(self._orders) >= _MOST_ORDERS:
                self._orders.clear()
            hasher = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8)
            drawn = sorted((_draw(hasher, member), member) for member in self._members)
            found = self._orders[key] = tuple(member for _, member in drawn)
        return found


def _draw(hasher: "hashlib.blake2b", member: str) -> bytes:
    own = hasher.copy()
    own.update(b"\0" + member.encode())
    return own.digest()
