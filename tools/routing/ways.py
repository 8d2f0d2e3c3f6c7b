"""Ways of choosing a replica, each as one router sees it: its own requests at once, all else as it was told."""

from collections.abc import Callable, Mapping
from random import Random
from typing import Protocol

from simulated_replica import MAX_ROWS, Replica
from swaplora_server.cluster.affinity import Affinity, ReplicaState, RouteKey


class Policy(Protocol):
    """One router."""

    def set_replicas(self, replicas: Mapping[str, Replica]) -> None: ...

    def told(self, replica: Replica, now: float) -> None:
        """What a replica told of itself has arrived."""
        ...

    def choose(self, adapter: str, now: float) -> str: ...

    def completed(self, name: str) -> None: ...


class ByAffinity:
    """The one that is served with."""

    def __init__(self, seed: int) -> None:
        self._affinity = Affinity(Random(seed))

    def set_replicas(self, replicas: Mapping[str, Replica]) -> None:
        self._affinity.set_replicas(replicas)

    def told(self, replica: Replica, now: float) -> None:
        state = ReplicaState(frozenset(replica.memory), replica.ongoing, MAX_ROWS)
        self._affinity.told(replica.name, state, now)

    def choose(self, adapter: str, now: float) -> str:
        key = RouteKey((adapter,))
        chosen = self._affinity.rank(key, now)[0]
        self._affinity.routed(key, chosen, now)
        return chosen

    def completed(self, name: str) -> None:
        self._affinity.completed(name)


class ByRandom:
    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._names: list[str] = []

    def set_replicas(self, replicas: Mapping[str, Replica]) -> None:
        self._names = list(replicas)

    def told(self, replica: Replica, now: float) -> None:
        pass

    def choose(self, adapter: str, now: float) -> str:
        return self._random.choice(self._names)

    def completed(self, name: str) -> None:
        pass


class ByTurns(ByRandom):
    """Round robin."""

    _turn = 0

    def choose(self, adapter: str, now: float) -> str:
        self._turn += 1
        return self._names[self._turn % len(self._names)]


class ByTwo(ByRandom):
    """The less loaded of two that are drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._in_flight: dict[str, int] = {}
        self._others: dict[str, int] = {}

    def set_replicas(self, replicas: Mapping[str, Replica]) -> None:
        super().set_replicas(replicas)
        self._in_flight = {name: self._in_flight.get(name, 0) for name in replicas}

    def told(self, replica: Replica, now: float) -> None:
        self._others[replica.name] = max(0, replica.ongoing - self._in_flight[replica.name])

    def choose(self, adapter: str, now: float) -> str:
        return self._send(self._less_loaded(self._names))

    def completed(self, name: str) -> None:
        if name in self._in_flight:
            self._in_flight[name] -= 1

    def _less_loaded(self, names: list[str]) -> str:
        return min(self._random.sample(names, min(2, len(names))), key=self._load)

    def _load(self, name: str) -> int:
        return self._in_flight[name] + self._others.get(name, 0)

    def _send(self, name: str) -> str:
        self._in_flight[name] += 1
        return name


class ByMultiplexing(ByTwo):
    """Ray Serve's rule for `@serve.multiplexed`: whoever has the model, else whoever has fewest, each by two draws.

    Replicas push what they have as soon as it changes, so here it is known at once.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._replicas: Mapping[str, Replica] = {}

    def set_replicas(self, replicas: Mapping[str, Replica]) -> None:
        super().set_replicas(replicas)
        self._replicas = dict(replicas)

    def choose(self, adapter: str, now: float) -> str:
        having = [name for name, replica in self._replicas.items() if adapter in replica.memory]
        free = [name for name in having if self._load(name) < MAX_ROWS]
        if not free:
            fewest = min(len(replica.memory) for replica in self._replicas.values())
            free = [name for name, replica in self._replicas.items() if len(replica.memory) == fewest]
        return self._send(self._less_loaded(free))


POLICIES: dict[str, Callable[[int], Policy]] = {
    "affinity": ByAffinity,
    "Ray's multiplexing": ByMultiplexing,
    "two choices": ByTwo,
    "round robin": ByTurns,
    "random": ByRandom,
}
