"""What requests want in memory, and what is there: each knows the other. The memory queue says who gets room."""

from collections.abc import Mapping
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field

from swaplora_adapters.weights.served import AdapterWeights


@dataclass(slots=True, eq=False)
class Claim:
    """All versions that one request wants in memory together, digest → bytes: it has all of them or none.

    `beside` are bytes of what it has made of their weights, and is kept with these.
    """

    sizes: Mapping[str, int]
    asked_at: float
    tenant: str = ""
    beside: Mapping[str, int] = field(default_factory=dict)
    turn: int = 0  # of its tenant: who has the lower one stands before it
    weights: Future[Mapping[str, AdapterWeights]] = field(default_factory=Future)  # by digest
    at_fault: str | None = None  # the digest that could not be loaded
    residents: tuple["Resident", ...] = ()  # what it uses, once it was admitted
    admitted_at: float = 0.0

    @property
    def nbytes(self) -> int:
        """Of all that it wants."""
        return sum(self.sizes.values()) + sum(self.beside.values())

    @property
    def is_loaded(self) -> bool:
        """Whether all that it was admitted for is there."""
        return all(resident.weights is not None for resident in self.residents)


@dataclass(slots=True, eq=False)
class Resident:
    """A version in memory, or being loaded: its bytes count from the moment it is given room."""

    digest: str
    size: int  # bytes of the weights alone
    beside: int = 0  # and of what was made of them
    weights: AdapterWeights | None = None  # None while they are loaded
    users: dict[Claim, None] = field(default_factory=dict)  # in the order in which they were admitted
    is_loading: bool = False  # somebody loads it
    is_dropped: bool = False  # gone as soon as nobody uses it

    @property
    def nbytes(self) -> int:
        return self.size + self.beside

    @property
    def is_idle(self) -> bool:
        return self.weights is not None and not self.users

    @property
    def beside_in_use(self) -> int:
        """Of what was made of its weights, what cannot be let go now."""
        return 0 if self.is_idle else self.beside

    def let_go_beside(self) -> None:
        """While it is idle. What was made lives as long as the object it was made of: the next get another."""
        self.weights, self.beside = copy(self.weights), 0

    def has_user_admitted_by(self, moment: float) -> bool:
        """Whether one of its users was admitted then or before."""
        return any(claim.admitted_at <= moment for claim in self.users)
