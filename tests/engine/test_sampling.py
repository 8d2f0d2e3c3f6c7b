"""The next token: greedy, filtered, seeded; a row's draw depends on nothing but itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swaplora_server.engine.request import Request, SamplingParams, Sequence
from swaplora_server.engine.sampling import Sampler, filtered_probs


def sequence(**params: object) -> Sequence:
    fields = SamplingParams(max_tokens=10, **params)  # type: ignore[arg-type]
    return Sequence(Request("r", (1, 2), fields, emit=lambda _event: None), 0)


def logits(rows: int = 1, vocab: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_temperature_zero_takes_the_likeliest() -> None:
    rows = logits(8)
    chosen = Sampler().sample(rows, [sequence(temperature=0) for _ in range(8)])
    assert [sampled.token_id for sampled in chosen] == rows.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_yields_nothing_and_its_neighbours_are_as_ever(bad: float) -> None:
    rows = logits(3)
    rows[1, 7] = bad
    chosen = Sampler().sample(rows, [sequence(temperature=0) for _ in range(3)])
    assert [sampled.token_id for sampled in chosen] == [int(rows[0].argmax()), None, int(rows[2].argmax())]


def test_a_seed_repeats_and_does_not_depend_on_neighbours() -> None:
    rows = logits(5)
    alone = [Sampler().sample(rows[2:3], [sequence(seed=11)])[0].token_id for _ in range(2)]
    among = Sampler().sample(rows, [sequence(seed=number) for number in (1, 2, 11, 4, 5)])
    assert alone == [among[2].token_id] * 2


def test_draws_follow_the_distribution() -> None:
    row = torch.tensor([[0.0, 1.0, 2.0]])
    sampler, drawn = Sampler(), sequence(seed=3)
    counts = torch.zeros(3)
    for _ in range(4000):
        token = sampler.sample(row, [drawn])[0].token_id
        assert token is not None
        counts[token] += 1
    assert (counts / 4000 - row[0].softmax(-1)).abs().max() < 0.03


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = logits()
    sampled = Sampler().sample(row, [sequence(temperature=0.3, top_k=2, seed=1, num_logprobs=4)])[0]
    assert sampled.logprobs is not None
    assert sampled.token_id is not None
    expected = row[0].log_softmax(-1)
    assert sampled.logprobs.chosen == pytest.approx(float(expected[sampled.token_id]))
    assert [token for token, _ in sampled.logprobs.top] == expected.topk(4).indices.tolist()


def test_stop_tokens_cannot_come_before_min_tokens() -> None:
    row = logits()
    best = int(row[0].argmax())
    held = sequence(temperature=0, min_tokens=1, stop_token_ids=frozenset({best}))
    assert Sampler().sample(row, [held])[0].token_id == row[0].topk(2).indices[1]


@settings(deadline=None)
@given(st.floats(0.01, 10), st.integers(0, 60), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 1000))
def test_filters_keep_the_likeliest_and_what_they_must(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    row = logits(seed=seed)[0]
    params = SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probs = filtered_probs(row, params)
    plain = (row / temperature).softmax(-1)
    kept = probs > 0
    assert kept[row.argmax()]
    assert kept.sum() <= (top_k or 50)
    if top_p < 1:
        ordered = plain[kept].sort(descending=True).values
        mass = plain.topk(top_k).values.sum() if top_k and top_k < 50 else 1.0
        assert ordered[:-1].sum() / mass <= top_p + 1e-4
    if min_p:
        assert (probs[kept] >= min_p * probs.max() * (1 - 1e-5)).all()


def test_a_tiny_temperature_is_greedy() -> None:
    row = logits()
    assert Sampler().sample(row, [sequence(temperature=1e-9, seed=1)])[0].token_id == int(row.argmax())


def test_a_logprob_beyond_what_json_can_write_is_cut_off() -> None:
    """Of logits that are finite, and too far apart for their difference to be."""
    rows = torch.tensor([[2.3e38, -2.3e38, 0.0]])
    (sampled,) = Sampler().sample(rows, [sequence(temperature=0, num_logprobs=3)])
    assert sampled.logprobs is not None
    assert [logprob for _token_id, logprob in sampled.logprobs.top] == [0.0, -9999.0, -9999.0]
