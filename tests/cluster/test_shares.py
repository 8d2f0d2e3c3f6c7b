"""Counts that decay, against counts that are kept one by one."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaplora_server.cluster.shares import Shares

gaps_of = st.floats(0, 500) | st.sampled_from([2_000.0, 50_000.0, 1e7])  # a night, a season: weights would overflow
requests = st.lists(st.tuples(gaps_of, st.sampled_from(["a", "b", ""])), min_size=1, max_size=60)


@given(requests)
def test_a_share_is_what_each_request_is_worth_by_its_age(gaps: list[tuple[float, str]]) -> None:
    shares, now, seen = Shares(), 0.0, []
    for gap, name in gaps:
        now += gap
        shares.add((name,) if name else (), now)
        seen.append((now, name))
    worth = {name: sum(math.exp((at - now) / 60) for at, whose in seen if whose == name) for name in ("a", "b", "")}
    counted = max(0.0, worth["a"] - math.sqrt(worth["a"]))
    assert shares.of("a", now) == pytest.approx(counted / sum(worth.values()), rel=1e-6, abs=0.002)


def test_names_that_come_once_are_forgotten() -> None:
    shares = Shares()
    for _ in range(1000):
        shares.add(("often",), 0.0)
    for number in range(60_000):
        shares.add((f"name{number}",), number / 10_000)
    assert len(pickle.dumps(shares)) < 2**20
    assert shares.of("often", 10.0) > 0.005
