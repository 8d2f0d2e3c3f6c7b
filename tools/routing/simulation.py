"""Requests for many adapters on many replicas through routers that learn late: events in order of time, seeded."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from simulated_replica import MEAN_TOKENS, REQUESTS_A_SECOND, Replica, Request
from ways import Policy


@dataclass(frozen=True)
class Traffic:
    num_adapters: int = 10_000
    exponent: float = 1.0  # of zipf's law
    num_replicas: int = 8
    memory: int = 400  # adapters that fit into one replica's: 4 GiB of rank 16 for a base of 135M
    period: float = 1.0  # seconds between two tellings of a replica, and what they take to arrive
    num_routers: int = 2
    utilization: float = 0.7
    warm_up: int = 60_000  # requests that are not counted
    counted: int = 40_000
    loses_one_at: int | None = None  # requests after which a replica is lost
    has_one_more_at: int | None = None
    seed: int = 1


@dataclass
class Figures:
    """Of the requests that are counted."""

    hit_rate: float
    loads_per_100: float
    imbalance: float  # the busiest replica's requests, to the mean
    wait_p50: float
    wait_p99: float
    total_mean: float  # from a request's arrival to its end
    total_p99: float
    choose_us: float  # of a router's processor time for each, mean


def simulate(traffic: Traffic, make_policy: Callable[[int], Policy]) -> Figures:
    """One run."""
    return _Run(traffic, make_policy).figures()


class _Run:
    def __init__(self, traffic: Traffic, make_policy: Callable[[int], Policy]) -> None:
        self._traffic = traffic
        rng = np.random.default_rng(traffic.seed)
        total = traffic.warm_up + traffic.counted
        shares = np.arange(1, traffic.num_adapters + 1) ** -traffic.exponent
        names = [f"adapter-{number}" for number in range(traffic.num_adapters)]
        self._adapters = [names[drawn] for drawn in rng.choice(traffic.num_adapters, total, p=shares / shares.sum())]
        rate = traffic.utilization * REQUESTS_A_SECOND * traffic.num_replicas
        self._times = np.cumsum(rng.exponential(1 / rate, total)).tolist()
        self._router_of = rng.integers(0, traffic.num_routers, total).tolist()
        self._tokens = rng.exponential(MEAN_TOKENS, total).tolist()
        self._tie = itertools.count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._routers = [make_policy(traffic.seed + number) for number in range(traffic.num_routers)]
        self._replicas: dict[str, Replica] = {}
        self._served: list[Request] = []
        self._choosing = 0.0
        for number in range(traffic.num_replicas):
            self._add(f"replica-{number}", 0.0)

    def figures(self) -> Figures:
        traffic = self._traffic
        for number, (at, adapter) in enumerate(zip(self._times, self._adapters, strict=True)):
            self._run_until(at)
            if number == traffic.loses_one_at:
                self._lose(next(iter(self._replicas)))
            if number == traffic.has_one_more_at:
                self._add("replica-new", at)
            if number == traffic.warm_up:
                self._begin_to_count()
            self._route(Request(adapter, self._router_of[number], at, self._tokens[number]), at)
        return self._counted()

    def _counted(self) -> Figures:
        replicas, count = self._replicas.values(), self._traffic.counted
        loads = sum(replica.num_loads for replica in replicas)
        served = [replica.num_served for replica in replicas]
        waits = [request.waited for request in self._served]
        totals = [request.ended - request.arrived for request in self._served]
        return Figures(
            hit_rate=1 - loads / sum(served),
            loads_per_100=100 * loads / sum(served),
            imbalance=max(served) * len(served) / sum(served),
            wait_p50=float(np.percentile(waits, 50)),
            wait_p99=float(np.percentile(waits, 99)),
            total_mean=float(np.mean(totals)),
            total_p99=float(np.percentile(totals, 99)),
            choose_us=1e6 * self._choosing / count,
        )

    def _begin_to_count(self) -> None:
        self._served, self._choosing = [], 0.0
        for replica in self._replicas.values():
            replica.num_loads = replica.num_served = 0

    def _route(self, request: Request, now: float) -> None:
        begun = time.perf_counter()
        request.replica = self._routers[request.router].choose(request.adapter, now)
        self._choosing += time.perf_counter() - begun
        replica = self._replicas[request.replica]
        ready = replica.arrive(request, now)
        if ready > now:
            self._at(ready, lambda at: self._begin(replica, request, at))
            self._await_end(replica)
        else:
            self._begin(replica, request, now)

    def _begin(self, replica: Replica, request: Request, now: float) -> None:
        replica.begin(request, now)
        self._await_end(replica)

    def _await_end(self, replica: Replica) -> None:
        """What was awaited before is void once a row has come or gone."""
        end = replica.next_end()
        replica.version += 1
        version = replica.version
        if end is not None:
            self._at(end, lambda at: self._end(replica, at) if replica.version == version else None)

    def _end(self, replica: Replica, now: float) -> None:
        request = replica.end(now)
        self._served.append(request)
        self._routers[request.router].completed(replica.name)
        self._await_end(replica)

    def _tell(self, replica: Replica, now: float) -> None:
        """Every period, to all routers, as long as it is there."""
        if self._replicas.get(replica.name) is replica:
            for router in self._routers:
                router.told(replica, now)
            self._at(now + self._traffic.period, lambda at: self._tell(replica, at))

    def _add(self, name: str, now: float) -> None:
        replica = self._replicas[name] = Replica(name, self._traffic.memory, now=now)
        self._set()
        first = now + self._traffic.period * len(self._replicas) / (self._traffic.num_replicas + 1)
        self._at(first, lambda at: self._tell(replica, at))

    def _lose(self, name: str) -> None:
        """With all that runs there: those requests have ended, with an error."""
        lost = self._replicas.pop(name)
        lost.version += 1
        self._set()

    def _set(self) -> None:
        replicas: Mapping[str, Replica] = self._replicas
        for router in self._routers:
            router.set_replicas(replicas)

    def _at(self, when: float, event: Callable[[float], None]) -> None:
        heappush(self._events, (when, next(self._tie), event))

    def _run_until(self, now: float) -> None:
        while self._events and self._events[0][0] <= now:
            at, _, event = heappop(self._events)
            event(at)
