"""Who waits, and in which order they may begin: fair between tenants, then between the adapters of each, then by age.

Virtual token counters (Sheng et al., Fairness in Serving Large Language Models, 2024) at both levels: every tenant, and
every adapter of a tenant, has an account of what it was served, and whose account is lowest begins next. A prompt is
charged when it begins, as far as the cache does not hold it, and each token that is generated when it comes. Whoever
has had nobody waiting is lifted to the lowest of those who have: time in which one asked for nothing is no credit.
So of any two who always have somebody waiting, neither gets ahead by more than what runs at once.

Within a tenant a lower `priority` goes first, whatever the adapter; what others of the tenant are served is charged all
the same, so that no tenant gains by it. Pure decisions: imports no torch.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from heapq import heapify, heappop, heapreplace
from itertools import takewhile
from typing import Generic, TypeVar

from swaplora_server.engine.request import Sequence

PROMPT_WEIGHT = 1  # of a token; generated ones are dearer, as in the paper and in the price lists of the trade
GENERATED_WEIGHT = 2

Line = tuple[str, tuple[str, ...]]  # a tenant's sequences of the same adapters, by digest
Over = Container[Line | str]  # lines, or tenants with all of theirs, that have no turn any more


class Account(ABC):
    """What one of those who share was served, in weighted tokens, and how many of its sequences wait."""

    def __init__(self) -> None:
        self.served = 0
        self.num_waiting = 0

    @abstractmethod
    def turns(self, over: Over) -> Iterator[Sequence]:
        """Its sequences that wait, as they are now, in the order in which they may begin.

        As soon as a line of them is in `over`, or their tenant, what is left of it has no turn.
        """

    @abstractmethod
    def rank(self, first: Sequence | None = None) -> tuple[int, int, int]:
        """The least has its turn next, which is that of `first`; without it, that of the first of all its turns."""


A = TypeVar("A", bound=Account)


class Accounts(Generic[A]):
    """Those among whom something is shared. Who is not among them was served no more than any who waits."""

    def __init__(self, make: Callable[[], A]) -> None:
        self._make = make
        self._accounts: dict[Hashable, A] = {}
        self._last: Account | None = None  # of those who have nobody waiting any more, the last to come to that

    def __len__(self) -> int:
        return len(self._accounts)

    def waiting(self) -> Iterable[A]:
        """Those who have somebody waiting."""
        return (account for account in self._accounts.values() if account.num_waiting)

    def account(self, key: Hashable) -> A:
        """That of `key`, opened if there is none."""
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = self._make()
            account.served = self._least()
        return account

    def enter(self, key: Hashable) -> A:
        """One more of its sequences waits."""
        account = self.account(key)
        if not account.num_waiting:
            least = self._least()
            account.served = max(account.served, least)
            self._accounts = {
                key: other
                for key, other in self._accounts.items()
                if other.num_waiting or other.served > least or other is account
            }
        account.num_waiting += 1
        return account

    def leave(self, key: Hashable) -> A:
        """One of its sequences waits no more."""
        account = self._accounts[key]
        account.num_waiting -= 1
        if not account.num_waiting:
            self._last = account
        return account

    def _least(self) -> int:
        """What those who wait were served at least; if nobody does, what the last who did has been."""
        last = self._last.served if self._last else 0
        return min((account.served for account in self.waiting()), default=last)


class AdapterLine(Account):
    """The sequences of one adapter that wait: those of one priority in the order in which they came."""

    def __init__(self) -> None:
        super().__init__()
        self._sequences: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[bisect_left(self._sequences, _place(sequence), key=_place)]

    def turns(self, over: Over) -> Iterator[Sequence]:
        return takewhile(lambda sequence: sequence.request.line not in over, tuple(self._sequences))

    def rank(self, first: Sequence | None = None) -> tuple[int, int, int]:
        priority, arrival = _place(first or self._sequences[0])
        return priority, self.served, arrival


class TenantLines(Account):
    """The lines of one tenant's adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = Accounts(AdapterLine)
        self.since = 0  # the arrival of the first that came when none of it waited

    def turns(self, over: Over) -> Iterator[Sequence]:
        return takewhile(lambda sequence: sequence.request.tenant not in over, _by_turns(self.lines.waiting(), over))

    def rank(self, first: Sequence | None = None) -> tuple[int, int, int]:
        return 0, self.served, first.arrival if first else self.since


class WaitingLine:
    """Every sequence that waits. One that has to wait once more goes before those of its adapter that came later."""

    def __init__(self) -> None:
        self._tenants = Accounts(TenantLines)
        self._sequences: dict[Sequence, int] = {}  # and how many had come, with it
        self._num_of: dict[tuple[str, ...], Counter[Line]] = {}  # that wait, by the first digest, if any
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """In no order that means anything."""
        return iter(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    def add(self, sequence: Sequence) -> None:
        self._num_added += 1
        self._sequences[sequence] = self._num_added
        tenant = self._tenants.enter(sequence.request.tenant)
        if tenant.num_waiting == 1:
            tenant.since = sequence.arrival
        tenant.lines.enter(sequence.request.digests).add(sequence)
        self._num_of.setdefault(sequence.request.digests[:1], Counter())[sequence.request.line] += 1

    def remove(self, sequence: Sequence) -> None:
        """Raises KeyError for one that does not wait."""
        request = sequence.request
        del self._sequences[sequence]
        self._tenants.leave(request.tenant).lines.leave(request.digests).remove(sequence)
        num_of = self._num_of[request.digests[:1]]
        num_of[request.line] -= 1
        if not num_of[request.line]:
            del num_of[request.line]
        if not num_of:
            del self._num_of[request.digests[:1]]

    def charge(self, sequence: Sequence, num_tokens: int, weight: int) -> None:
        """Say that so many tokens were computed for it, or will be at once."""
        tenant = self._tenants.account(sequence.request.tenant)
        for account in (tenant, tenant.lines.account(sequence.request.digests)):
            account.served += weight * num_tokens

    def turns(self, over: Over = ()) -> Iterator[Sequence]:
        """All that wait, each once, in the order in which they may begin.

        Whom the last one is charged with counts at once. Those that come meanwhile are not among them, nor those whose
        line or tenant is in `over` by then.
        """
        return self._here(_by_turns(self._tenants.waiting(), over))

    def turns_beside(self, digests: set[str], over: Over) -> Iterator[Sequence]:
        """The same for lines that ask for no adapters but these: those of the base, too, and of whichever tenant.

        Each has all its turns before the next: whoever was served least first.
        """
        firsts = [(), *((digest,) for digest in digests)]
        lines = [line for first in firsts for line in self._num_of.get(first, ()) if digests.issuperset(line[1])]
        tenants = ((self._tenants.account(tenant), of) for tenant, of in lines)
        accounts = [(tenant, tenant.lines.account(of)) for tenant, of in tenants]
        accounts.sort(key=lambda account: (account[0].served, account[1].served))
        return self._here(sequence for _, line in accounts for sequence in line.turns(over))

    def _here(self, turns: Iterator[Sequence]) -> Iterator[Sequence]:
        """Those of them that wait by then, and did when this was called."""
        num_added = self._num_added
        return (sequence for sequence in turns if self._sequences.get(sequence, math.inf) <= num_added)


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival


def _by_turns(accounts: Iterable[A], over: Over) -> Iterator[Sequence]:
    """Of what each would have begin next that of the account which was served least, over and over; ties by age.

    What the others would have begin is not looked at before it is their turn.
    """
    heap: list[tuple[tuple[int, int, int], A, Sequence | None, Iterator[Sequence]]]
    heap = [(account.rank(), account, None, iter(())) for account in accounts]
    heapify(heap)
    while heap:
        _, account, first, turns = heap[0]
        if first is None:
            turns = account.turns(over)
            first = next(turns, None)
        if first is not None:
            yield first
        following = next(turns, None)
        if following is None:
            heappop(heap)
        else:
            heapreplace(heap, (account.rank(following), account, following, turns))
