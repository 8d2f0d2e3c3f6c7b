"""What a request wants in memory, and what is there. Plain data: the room decides."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from swaplora_adapters.weights.served import AdapterWeights


@dataclass(slots=True, eq=False)
class Claim:
    """All versions that one request wants in memory together, digest → bytes: it has all of them or none."""

    sizes: Mapping[str, int]
    asked_at: float
    weights: Future[Mapping[str, AdapterWeights]] = field(default_factory=Future)  # by digest
    at_fault: str | None = None  # the digest that could not be loaded
    copies: tuple["Copy", ...] = ()  # what it uses, once it was let in
    let_in_at: float = 0.0

    @property
    def is_loaded(self) -> bool:
        """Whether all that it was let in for is there."""
        return all(copy.weights is not None for copy in self.copies)


@dataclass(slots=True, eq=False)
class Copy:
    """A version in memory, or being loaded: its bytes count from the moment it is given room."""

    digest: str
    nbytes: int
    weights: AdapterWeights | None = None  # None while they are loaded
    users: dict[Claim, None] = field(default_factory=dict)  # in the order in which they were let in
    is_on_its_way: bool = False  # somebody loads it
    is_dropped: bool = False  # gone as soon as nobody uses it

    @property
    def is_idle(self) -> bool:
        return self.weights is not None and not self.users

    def has_user_from(self, moment: float) -> bool:
        """Whether one of its users was let in then or before."""
        return any(claim.let_in_at <= moment for claim in self.users)
