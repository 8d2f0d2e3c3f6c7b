"""Random numbers that follow from a seed, a sequence and a position alone, and the draws that are made of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sampling_oracle as oracle
from swaplora_server.engine.sampling.draw import draw, noise_of
from swaplora_server.engine.sampling.noise import DrawKey, exponentials, minus_log
from swaplora_server.engine.sampling.philox import philox

# counter, key and answer of philox4x32-10, of the known answers that Random123, its authors' library, is tested with
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = st.integers(0, 2**64 - 1)
words = st.integers(0, 2**32 - 1)


def test_the_generator_is_philox() -> None:
    counters = np.array([counter for counter, _, _ in KNOWN], np.uint64).T[..., None]
    keys = np.array([key for _, key, _ in KNOWN], np.uint64).T
    assert philox(counters, keys)[..., 0].T.tolist() == [list(answer) for _, _, answer in KNOWN]


@given(st.tuples(*[words] * 4), st.tuples(words, words))
def test_the_generator_is_as_its_paper_has_it(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    said = philox(np.array(counter, np.uint64)[:, None, None], np.array(key, np.uint64)[:, None])
    assert said[:, 0, 0].tolist() == oracle.philox(list(counter), list(key))


@given(st.lists(words, min_size=1, max_size=20))
def test_the_logarithm_is_one(drawn: list[int]) -> None:
    drawn += [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    said = minus_log(np.array(drawn, np.uint64))
    assert said.tolist() == pytest.approx([-math.log((word + 0.5) / 2**32) for word in drawn], rel=1e-12)
    assert (said > 0).all()


def test_the_random_numbers_are_what_they_were() -> None:
    """To the last bit: the same seed gives the same text on every machine, and after an update."""
    noise = exponentials([DrawKey(0, 0, 0), DrawKey(2**64 - 1, 3, 1000)], 5)
    assert noise.tobytes().hex() == ("712e6b3fd64b023e06249d3e6c71003fac9de63c2567133d4de5fd3b12742e3d3b073c40b158743f")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(SEEDS, st.integers(0, 127), st.integers(0, 2**31)), min_size=1, max_size=5), st.data())
def test_each_key_has_its_numbers_whoever_is_beside_it(keys: list[tuple[int, int, int]], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30))
    together = exponentials([DrawKey(*key) for key in keys], count + 7)
    for row, key in zip(together, keys, strict=True):
        assert exponentials([DrawKey(*key)], count)[0].tolist() == row[:count].tolist()
        assert row.tolist() == pytest.approx(oracle.exponentials(*key, count + 7), rel=1e-6)


def drawn_by(probs: torch.Tensor, keys: list[DrawKey]) -> torch.Tensor:
    return draw(probs, torch.from_numpy(noise_of(keys, probs.shape[-1])))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 1500), SEEDS, st.integers(0, 127), st.integers(0, 10**6))
def test_a_draw_is_the_race_that_it_says(vocab_size: int, seed: int, index: int, position: int) -> None:
    probs = torch.rand(3, vocab_size, generator=torch.Generator().manual_seed(seed % 1000)).pow(4)
    keys = [DrawKey(seed, index, position + row) for row in range(3)]
    drawn = drawn_by(probs, keys)
    assert drawn.tolist() == [oracle.draw(row.tolist(), *key) for row, key in zip(probs, keys, strict=True)]


# of chi-square with so many degrees of freedom, the value that is exceeded once in a thousand times
CHI_SQUARE = {4: 18.47, 99: 148.23}


@pytest.mark.parametrize("what", ["positions", "sequences", "seeds"])
@pytest.mark.parametrize("vocab_size", [5, 1000])
def test_draws_are_distributed_as_the_probabilities(vocab_size: int, what: str) -> None:
    """Of one sequence's positions, of a position in many sequences, and of many seeds. 1000 tokens are four groups."""
    count = 4000
    row = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)).softmax(-1)
    keys = [DrawKey(*{"positions": (7, 0, n), "sequences": (7, n, 3), "seeds": (n, 0, 3)}[what]) for n in range(count)]
    drawn = torch.cat([drawn_by(row.expand(1000, -1), keys[start : start + 1000]) for start in range(0, count, 1000)])
    bins = min(vocab_size, 100)
    seen = torch.bincount(drawn % bins, minlength=bins).double()
    expected = torch.zeros(bins).index_add(0, torch.arange(vocab_size) % bins, row).double() * count
    assert expected.min() > 5
    assert float(((seen - expected) ** 2 / expected).sum()) < CHI_SQUARE[bins - 1]


def test_what_cannot_come_is_never_drawn() -> None:
    """However little what can come is: a float32's least, beside nothing."""
    probs = torch.zeros(200, 700)
    probs[:, 517] = 1e-45
    assert set(drawn_by(probs, [DrawKey(seed, 0, 0) for seed in range(200)]).tolist()) == {517}
