"""Which replica serves a request: decisions alone, without Ray, clock or thread; whoever asks brings the time.

An adapter belongs to one replica, its home, which all routers find alike (`rendezvous.py`). It is loaded there and
stays in memory there, so that all replicas together hold as many adapters as fit into all their memories. Against that
stands that no replica may have much more to do than others (consistent hashing with bounded loads, Mirrokni et al.,
2016):

1. Its home serves it, while that has less than BOUND of the mean load. An adapter that alone makes HOT of a
   replica's share of all requests has another home for each such part, and goes to the one with the least to do, a
   load into memory counted in: so the few that are asked most fill what the many others leave uneven.
2. A replica elsewhere that has it in memory comes before a home that has not, while it has about the mean to do.
   Above that the home loads it: so a new replica takes those that belong to it, one at a time, and no others.
3. Where the homes have too much to do, others that have it in memory come next, then the rest in its own order.

Requests for several adapters go by the rarest, which the fewest replicas have in memory, then by how many of the others
are there. Those for the base go to the less loaded of two. How a prompt begins, of which a replica may keep the
beginning, decides among those that are equally good.

A version that a request names is at home where its name is, and counts as in memory where this router has sent it in
the last minutes: replicas tell of current versions alone. One that was sent nowhere is looked for by its name.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from random import Random

from swaplora_server.cluster.rendezvous import Rendezvous
from swaplora_server.cluster.shares import Shares

BOUND = 1.25  # times the mean load that one replica may have, as KubeAI's
ALWAYS = 4  # requests that a replica may have in any case: so few slow each other down less than a load would
HOT = 0.1  # of a replica's share of requests, from which on an adapter has one more home
COLD = 2  # requests in flight that a load into memory is worth
EQUAL = 1  # requests above the mean load that make no difference
SETTLING_SECONDS = 5.0  # from a request's routing until its adapter is in what its replica tells
PINNED_SECONDS = 300.0  # the same of a version that a request names, which no replica tells
_MOST_SENT = 4_096  # adapters that are remembered to have been sent to a replica


@dataclass(frozen=True)  # with slots it would be sent without names of fields, and another release may have one more
class RouteKey:
    """What a router needs to know of a request."""

    adapters: tuple[str, ...] = ()  # stored names, `acme~sql`, or of a version `acme~sql@3`; none for the base
    session: str = ""  # a digest of how the prompt begins, or of the cache salt
    tried: list[str] = field(default_factory=list, compare=False)  # replicas that it was given to, which come last


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What a replica tells of itself."""

    resident: frozenset[str]  # stored names of adapters in memory
    ongoing: int  # requests that wait or run
    capacity: int  # requests that run at once
    is_ready: bool = True


@dataclass(slots=True)
class _Replica:
    name: str
    state: ReplicaState = ReplicaState(frozenset(), 0, 0)
    in_flight: int = 0  # of this router
    peak: int = 0  # the most that was in flight since the replica last told: what it tells is as old
    others: int = 0  # of other routers, when it last told
    sent: dict[str, float] = field(default_factory=dict)  # adapter → when, what is not in `state` yet, oldest first

    def has(self, adapter: str) -> bool:
        return adapter in self.state.resident or adapter in self.sent


class Affinity:
    """What one router knows of all replicas, and whom it prefers. Belongs to one thread."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._replicas: dict[str, _Replica] = {}
        self._homes = Rendezvous()
        self._sessions = Rendezvous()  # come and go by the thousand, so they do not share what is remembered
        self._shares = Shares()

    def set_replicas(self, names: Iterable[str]) -> None:
        """All that there are from now on: of those that stay, what is known of them stays."""
        self._replicas = {name: self._replicas.get(name) or _Replica(name) for name in names}
        self._homes.set_members(self._replicas)
        self._sessions.set_members(self._replicas)

    def told(self, name: str, state: ReplicaState, at: float) -> None:
        """What a replica was like; `at` is when it was told, in seconds of the clock of `routed`."""
        replica = self._replicas[name]
        replica.state = state
        replica.others = max(0, state.ongoing - replica.peak)
        replica.peak = replica.in_flight
        replica.sent = {adapter: when for adapter, when in replica.sent.items() if when > at - _kept_seconds(adapter)}

    def routed(self, key: RouteKey, name: str, now: float) -> None:
        """A request is on its way to this replica: counts at once, until `completed`."""
        self._shares.add(key.adapters, now)
        replica = self._replicas.get(name)
        if replica is None:
            return
        replica.in_flight += 1
        replica.peak = max(replica.peak, replica.in_flight)
        for adapter in key.adapters:
            replica.sent.pop(adapter, None)
            replica.sent[adapter] = now
        while len(replica.sent) > _MOST_SENT:
            del replica.sent[next(iter(replica.sent))]

    def completed(self, name: str) -> None:
        """One that `routed` counted has ended, however it did."""
        replica = self._replicas.get(name)
        if replica is not None:
            replica.in_flight = max(0, replica.in_flight - 1)

    def rank(self, key: RouteKey, now: float) -> list[str]:
        """All replicas, the best first.

        Whatever they have, those that say they are not ready come behind the others, and those to which this very
        request was given before come last.
        """
        ranked = self._ranked(key, now)
        return sorted(ranked, key=lambda name: (name in key.tried, not self._replicas[name].state.is_ready))

    def _ranked(self, key: RouteKey, now: float) -> list[str]:
        loads = _Loads(self._replicas.values())
        if key.adapters:
            return self._by_adapter(replace(key, adapters=tuple(map(self._known, key.adapters))), loads, now)
        if key.session:
            return self._by_session(key.session, loads)
        return self._by_load(loads)

    def _by_adapter(self, key: RouteKey, loads: "_Loads", now: float) -> list[str]:
        rarest = self._rarest(key.adapters)
        order = self._homes.order(_name(rarest))
        num_homes = 1 + int(self._shares.of(rarest, now) * len(order) / HOT)
        is_home_warm = any(name in loads.below and self._replicas[name].has(rarest) for name in order[:num_homes])
        session = self._places(key.session) if num_homes > 1 else {}
        others = [adapter for adapter in key.adapters if adapter != rarest]

        def badness(name: str, place: int) -> tuple[int, int, float, int]:
            replica, load, is_home = self._replicas[name], loads.of[name], place < num_homes
            is_warm = replica.has(rarest)
            missing = sum([not replica.has(adapter) for adapter in others]) if others else 0
            if name not in loads.below:
                return 5, missing, load, place
            if is_home and is_home_warm:
                if session:
                    load, place = loads.beyond_equal(name), session[name]
                return 0, missing, load + (0 if is_warm else COLD), place
            if is_warm and not loads.beyond_equal(name):
                return 1, missing, load, place
            if is_home:
                return 2, missing, load, place
            return (3 if is_warm else 4), missing, 0, place

        return [name for _, name in sorted(zip(map(badness, order, range(len(order))), order, strict=True))]

    def _known(self, adapter: str) -> str:
        """A version that was sent nowhere may be the current one, or that may be needed next: it goes by its name."""
        name = _name(adapter)
        if name == adapter or any(replica.has(adapter) for replica in self._replicas.values()):
            return adapter
        return name

    def _rarest(self, adapters: Collection[str]) -> str:
        """The one that the fewest replicas have in memory."""
        if len(adapters) == 1:
            return next(iter(adapters))
        replicas = self._replicas.values()
        return min(adapters, key=lambda adapter: (sum(replica.has(adapter) for replica in replicas), adapter))

    def _by_session(self, session: str, loads: "_Loads") -> list[str]:
        """In the session's own order as long as it makes no difference to how loaded they are."""
        order = self._sessions.order(session)
        return sorted(order, key=loads.beyond_equal)

    def _places(self, session: str) -> dict[str, int]:
        return {name: place for place, name in enumerate(self._sessions.order(session))} if session else {}

    def _by_load(self, loads: "_Loads") -> list[str]:
        """The less loaded of two first: the least loaded of all would get all that comes before it tells of it.

        Mitzenmacher, "The power of two choices in randomized load balancing", 2001.
        """
        names = list(self._replicas)
        self._random.shuffle(names)
        return [*sorted(names[:2], key=loads.of.__getitem__), *sorted(names[2:], key=loads.of.__getitem__)]


def _name(adapter: str) -> str:
    """Of a version the name."""
    return adapter.partition("@")[0]


def _kept_seconds(adapter: str) -> float:
    return SETTLING_SECONDS if _name(adapter) == adapter else PINNED_SECONDS


class _Loads:
    """How loaded replicas are at one moment.

    `of` are loads in requests in flight, of a replica of the mean capacity; `below` are those that may have one more.
    """

    def __init__(self, replicas: Collection[_Replica]) -> None:
        count = max(1, len(replicas))
        loads = [replica.in_flight + replica.others for replica in replicas]
        capacities = [replica.state.capacity for replica in replicas]
        if not all(capacities):  # until all have told theirs, they are taken for equal
            capacities = [1] * len(capacities)
        all_capacity = sum(capacities)
        weights = [capacity * count / all_capacity for capacity in capacities]
        bound = BOUND * (sum(loads) + 1) / count
        self.mean = sum(loads) / count
        self.of: dict[str, float] = {}
        self.below = set()
        for replica, load, weight in zip(replicas, loads, weights, strict=True):
            self.of[replica.name] = load / weight
            if load < max(ALWAYS, math.ceil(bound * weight)):
                self.below.add(replica.name)

    def beyond_equal(self, name: str) -> float:
        return max(0.0, self.of[name] - self.mean - EQUAL)
