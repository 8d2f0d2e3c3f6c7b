"""A short simulation: what is served with is near enough to what can be had, and better than chance."""

from dataclasses import replace

import pytest

from simulation import Traffic, simulate
from ways import POLICIES

ON_TWO = Traffic(num_adapters=200, num_replicas=2, memory=150, warm_up=1500, counted=3000)


@pytest.mark.parametrize("period", [1.0, 10.0])
@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.2])
def test_adapters_are_found_in_memory_and_replicas_have_as_much_to_do(exponent: float, period: float) -> None:
    found = simulate(replace(ON_TWO, exponent=exponent, period=period), POLICIES["affinity"])
    assert found.hit_rate >= 0.95
    assert found.imbalance <= 1.3


def test_there_are_fewer_loads_than_by_chance_and_no_longer_waits() -> None:
    traffic = Traffic(num_adapters=500, num_replicas=4, memory=150, warm_up=2000, counted=2000)
    by_affinity, by_chance = (simulate(traffic, POLICIES[name]) for name in ("affinity", "random"))
    assert by_affinity.loads_per_100 < 0.5 * by_chance.loads_per_100
    assert by_affinity.total_mean < by_chance.total_mean
    assert by_affinity.imbalance <= 1.3


def test_a_lost_replica_moves_little_of_what_the_others_serve() -> None:
    traffic = Traffic(num_adapters=500, num_replicas=4, memory=200, warm_up=2000, counted=1000)
    lost = simulate(replace(traffic, loses_one_at=2000), POLICIES["affinity"])
    kept = simulate(traffic, POLICIES["affinity"])
    assert lost.hit_rate > kept.hit_rate - 0.1
    assert lost.imbalance <= 1.3


def test_the_same_seed_says_the_same() -> None:
    traffic = Traffic(num_replicas=4, warm_up=300, counted=300)
    one, other = (simulate(traffic, POLICIES["affinity"]) for _ in range(2))
    assert replace(one, choose_us=0.0) == replace(other, choose_us=0.0)
