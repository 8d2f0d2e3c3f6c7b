"""The next token: greedy, shaped, filtered, seeded; a row's depends on nothing but its own logits, tokens and seed."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sampling_oracle as oracle
from swaplora_server.engine.request import Request, SamplingParams, Sequence
from swaplora_server.engine.sampling.constraint import TokenBits, token_bits
from swaplora_server.engine.sampling.filters import Likeliest, keep_likeliest, keep_probable
from swaplora_server.engine.sampling.largest import largest
from swaplora_server.engine.sampling.sampler import NoTokenError, Sampler
from swaplora_server.engine.scheduling.batch import Sampled

VOCAB = 700  # two whole groups and a part of one


def sequence(
    index: int = 0, prompt: tuple[int, ...] = (1, 2), constrain: Callable[[], Any] | None = None, **params: object
) -> Sequence:
    fields = SamplingParams(max_tokens=10, **params)  # type: ignore[arg-type]
    request = Request("r", prompt, fields, emit=lambda _event: None, new_constraint=constrain)
    return Sequence(request, index)


def logits(rows: int = 1, vocab: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sample(rows: Tensor, *sequences: Sequence) -> list[int | None]:
    return [sampled.token_id for sampled in Sampler().sample(rows, sequences)]


def test_temperature_zero_takes_the_likeliest() -> None:
    rows = logits(8)
    assert sample(rows, *(sequence(temperature=0) for _ in range(8))) == rows.argmax(-1).tolist()


def test_of_equally_likely_tokens_the_first_is_taken() -> None:
    rows = torch.zeros(3, VOCAB)
    rows[1, [300, 301, 650]] = 1.0
    rows[2, [699, 698]] = 1.0
    assert sample(rows, *(sequence(temperature=0) for _ in range(3))) == [0, 300, 698]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_p": 0.9}, {"presence_penalty": 1.0}, {"num_logprobs": 2}])
def test_a_row_that_is_not_finite_yields_nothing_and_its_neighbours_are_as_ever(
    bad: float, params: dict[str, Any]
) -> None:
    rows = logits(3)
    expected = Sampler().sample(rows, [sequence(seed=n, **params) for n in range(3)])
    rows[1, 7] = bad
    assert Sampler().sample(rows, [sequence(seed=n, **params) for n in range(3)]) == [
        expected[0],
        Sampled(None),
        expected[2],
    ]


def test_a_seed_repeats_and_does_not_depend_on_neighbours() -> None:
    rows = logits(5)
    alone = [sample(rows[2:3], sequence(seed=11)) for _ in range(2)]
    among = sample(rows, *(sequence(seed=number) for number in (1, 2, 11, 4, 5)))
    assert alone == [[among[2]]] * 2


def test_draws_differ_by_seed_by_sequence_and_by_position() -> None:
    rows = logits(1, 1000).expand(40, -1) / 10
    assert len(set(sample(rows, *(sequence(seed=n) for n in range(40))))) > 30
    assert len(set(sample(rows, *(sequence(index=n, seed=1) for n in range(40))))) > 30
    moved = [sequence(seed=1) for _ in range(40)]
    for number, of_row in enumerate(moved):
        for _ in range(number):
            of_row.append(3)
    assert len(set(sample(rows, *moved))) > 30


def test_without_a_seed_each_request_has_one_of_its_own() -> None:
    rows = logits(1, 1000).expand(40, -1) / 10
    assert len(set(sample(rows, *(sequence() for _ in range(40))))) > 30
    one = sequence()
    assert len({sample(rows[:1], one)[0] for _ in range(5)}) == 1
    assert 0 <= one.request.draw_seed < 2**64


def test_a_penalty_of_what_was_generated_changes_nothing_before_the_first_token() -> None:
    row = logits()
    penalised = sequence(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert sample(row, penalised) == [int(row.argmax())]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = logits(1, VOCAB)
    for shaped in (
        {},
        {"logit_bias": ((3, 50.0),)},
        {"repetition_penalty": 2.0},
        {"allowed_token_ids": frozenset({9})},
    ):
        asked = sequence(temperature=0.3, top_k=2, seed=1, num_logprobs=4, **shaped)
        sampled = Sampler().sample(row, [asked])[0]
        assert sampled.logprobs is not None
        assert sampled.token_id is not None
        expected = row[0].log_softmax(-1)
        assert sampled.logprobs.chosen == float(expected[sampled.token_id])
        top = expected.topk(4)
        assert sampled.logprobs.top == tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def test_each_row_has_as_many_logprobs_as_it_asks_for() -> None:
    rows = torch.zeros(4, VOCAB)
    sampled = Sampler().sample(rows, [sequence(temperature=0, num_logprobs=n) for n in (0, 3, 20, None)])
    found = [None if of_row.logprobs is None else of_row.logprobs.top for of_row in sampled]
    assert [of_row and [token for token, _ in of_row] for of_row in found] == [(), [0, 1, 2], [*range(20)], None]


def test_a_logprob_beyond_what_json_can_write_is_cut_off() -> None:
    """Of logits that are finite, and too far apart for their difference to be."""
    rows = torch.tensor([[2.3e38, -2.3e38, 0.0]])
    (sampled,) = Sampler().sample(rows, [sequence(temperature=0, num_logprobs=3)])
    assert sampled.logprobs is not None
    assert [logprob for _token_id, logprob in sampled.logprobs.top] == [0.0, -9999.0, -9999.0]


def test_stop_tokens_cannot_come_before_min_tokens() -> None:
    row = logits()
    best, second = row[0].topk(2).indices.tolist()
    held = sequence(temperature=0, min_tokens=1, stop_token_ids=frozenset({best}))
    assert sample(row, held) == [second]
    held.append(second)
    assert sample(row, held) == [best]


def test_a_tiny_temperature_is_greedy() -> None:
    row = logits()
    assert sample(row, sequence(temperature=1e-9, seed=1)) == [int(row.argmax())]


def test_a_bias_is_added_and_what_is_not_allowed_never_comes() -> None:
    row = logits(1, VOCAB)
    best, second = row[0].topk(2).indices.tolist()
    assert sample(row, sequence(temperature=0, logit_bias=((best, -100.0),))) == [second]
    assert sample(row, sequence(temperature=0, logit_bias=((650, 100.0), (3, 50.0)))) == [650]
    assert sample(row, sequence(temperature=0, allowed_token_ids=frozenset({VOCAB - 1}))) == [VOCAB - 1]
    assert set(
        sample(row.expand(50, -1), *(sequence(allowed_token_ids=frozenset({0, 31, 32})) for _ in range(50)))
    ) <= {
        0,
        31,
        32,
    }


def test_a_request_that_forbids_every_token_ends_alone() -> None:
    rows = logits(3, VOCAB)
    ends = frozenset({5})
    barred = sequence(temperature=0, allowed_token_ids=ends, stop_token_ids=ends, min_tokens=1, num_logprobs=1)
    sampled = Sampler().sample(rows, [sequence(seed=1), barred, sequence(temperature=0)])
    assert isinstance(sampled[1].error, NoTokenError)
    assert [of_row.token_id for of_row in (sampled[0], sampled[2])] == sample(
        rows[::2], sequence(seed=1), sequence(temperature=0)
    )


class Evens:
    """A constraint with a state: even tokens and odd ones by turns, from a token on that grows."""

    is_busy = is_complete = False

    def __init__(self, vocab: int = VOCAB) -> None:
        self.vocab, self.said = vocab, [0]

    def forced(self) -> int | None:
        return None

    def allowed(self) -> TokenBits:
        return token_bits(range(self.said[-1] + 1, self.vocab, 2), self.vocab)

    def append(self, token_id: int) -> None:
        if token_id < self.said[-1]:
            raise ValueError(token_id)
        self.said.append(token_id)


def test_a_constraint_is_asked_before_each_token_and_told_after_it() -> None:
    made: list[Evens] = []

    def constrain() -> Evens:
        made.append(Evens())
        return made[-1]

    rows = logits(2, VOCAB)
    first = sequence(constrain=constrain, temperature=0)
    second = Sequence(first.request, 1)
    chooser = Sampler()
    for _ in range(4):
        for sampled, of_row in zip(chooser.sample(rows, [first, second]), [first, second], strict=True):
            assert sampled.token_id is not None
            of_row.append(sampled.token_id)
    assert [constraint.said[1:] for constraint in made] == [first.generated_ids(0), second.generated_ids(0)]
    for said in (constraint.said for constraint in made):
        assert all(token > before and (token - before) % 2 for before, token in pairwise(said))
    with pytest.raises(ValueError, match="0"):
        first.append(0)


@pytest.mark.parametrize("broken", ["cannot be made", "raises", "too short", "other type"])
def test_a_constraint_that_fails_costs_nobody_else(broken: str) -> None:
    class Broken(Evens):
        def __init__(self) -> None:
            if broken == "cannot be made":
                raise ValueError("a constraint")
            super().__init__()

        def allowed(self) -> Any:
            if broken == "raises":
                raise ValueError("a constraint")
            return super().allowed()[1:] if broken == "too short" else super().allowed().astype(np.int64)

    rows = logits(3, VOCAB)
    sampled = Sampler().sample(rows, [sequence(seed=1), sequence(constrain=Broken, num_logprobs=1), sequence(seed=2)])
    assert isinstance(sampled[1].error, ValueError)
    assert "a constraint" in str(sampled[1].error)
    assert [of_row.token_id for of_row in sampled[::2]] == sample(rows[::2], sequence(seed=1), sequence(seed=2))


@given(st.sets(st.integers(0, 99)), st.integers(100, 130))
def test_bits_are_those_of_the_tokens(tokens: set[int], vocab: int) -> None:
    words = token_bits(tokens, vocab)
    assert len(words) == -(-vocab // 32)
    assert {token for token in range(vocab) if int(words[token // 32]) >> token % 32 & 1} == tokens


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3000), st.data())
def test_the_largest_come_in_order_and_equal_ones_by_their_places(vocab: int, data: st.DataObject) -> None:
    count, levels, seed = (data.draw(st.integers(1, high)) for high in (vocab, 50, 1000))
    rows = torch.randint(-levels, levels, (3, vocab), generator=torch.Generator().manual_seed(seed)) / 7.0
    rows[rows == 0] *= -1.0
    values, places = largest(rows, count)
    ordered = rows.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(places, ordered.indices[:, :count])
    assert torch.equal(values, ordered.values[:, :count])


FILTERS: dict[str, Any] = {
    "temperature": st.floats(0.05, 10),
    "top_k": st.integers(0, VOCAB + 10),
    "top_p": st.floats(0.001, 1),
    "min_p": st.floats(0, 1),
}


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.fixed_dictionaries({}, optional=FILTERS), min_size=1, max_size=5),
    st.integers(0, 1000),
    st.booleans(),
    st.sampled_from([(), (4,), (40, 300)]),
)
@example(asked=[{"temperature": 0.05, "top_p": 0.5}], seed=0, is_coarse=True, rungs=())  # two of half, next to nothing
def test_the_filters_keep_what_their_definition_keeps(
    asked: list[dict[str, Any]], seed: int, is_coarse: bool, rungs: tuple[int, ...]
) -> None:
    """In rows with many equal probabilities too, and however few candidates are looked at first.

    Exact sums are the judge. The definition in float32 may differ where a sum is within its error of top_p.
    """
    rows = logits(len(asked), VOCAB, seed)
    rows = rows.round() if is_coarse else rows
    params = [SamplingParams(max_tokens=1, **fields) for fields in asked]
    plain = torch.stack([probs_of(row, fields) for row, fields in zip(rows, params, strict=True)])
    for row, fields, before, after in zip(rows, params, plain, filtered(plain, params, rungs), strict=True):
        kept = set(after.nonzero().squeeze(-1).tolist())
        assert kept == oracle.kept_tokens(row, fields) - set((before == 0).nonzero().squeeze(-1).tolist())
        assert torch.equal(after, torch.where(after > 0, before, 0.0))
        defined = set(oracle.filtered_probs(row, fields).nonzero().squeeze(-1).tolist())
        assert kept ^ defined <= doubtful(before, fields)


def probs_of(row: Tensor, params: SamplingParams) -> Tensor:
    return ((row - row.max()) / params.temperature).softmax(-1)


def filtered(probs: Tensor, params: list[SamplingParams], rungs: tuple[int, ...]) -> Tensor:
    probs = probs.clone()
    top_k = torch.tensor([[min(fields.top_k or VOCAB, VOCAB)] for fields in params])
    top_p = torch.tensor([[fields.top_p] for fields in params], dtype=torch.float64)
    keep_likeliest(probs, Likeliest(top_k, top_p, int(top_k.max())), rungs)
    keep_probable(probs, torch.tensor([[fields.min_p] for fields in params]))
    return probs


def doubtful(probs: Tensor, params: SamplingParams) -> set[int]:
    """The tokens before which a sum of probabilities is so near top_p that float32 cannot tell."""
    ordered = probs.double().sort(descending=True, stable=True)
    values = ordered.values[: params.top_k or None]
    share = (values.cumsum(-1) - values) / values.sum()
    return set(ordered.indices[: len(share)][(share - params.top_p).abs() < 1e-5].tolist())


TOKENS = st.integers(0, VOCAB - 1)
ASKED: dict[str, Any] = FILTERS | {
    "temperature": st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100), max_size=5).map(lambda bias: tuple(bias.items())),
    "allowed_token_ids": st.frozensets(TOKENS, min_size=60, max_size=80),
    "min_tokens": st.integers(0, 8),
    "stop_token_ids": st.frozensets(TOKENS, max_size=40),
    "num_logprobs": st.integers(0, 20),
}


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    """One that has generated some tokens, and may have a constraint."""
    params = draw(st.fixed_dictionaries({}, optional=ASKED))
    params.setdefault("seed", draw(ASKED["seed"]))
    prompt = tuple(draw(st.lists(TOKENS, min_size=1, max_size=6)))
    constrain = Evens if draw(st.booleans()) and "allowed_token_ids" not in params else None
    made = sequence(draw(st.integers(0, 127)), prompt, constrain, **params)
    for token in sorted(
        draw(st.lists(st.sampled_from(prompt) | TOKENS, max_size=9).filter(lambda said: max(said, default=0) < 500))
    ):
        made.append(token)
    return made


@settings(deadline=None, max_examples=25)
@given(st.lists(sequences(), min_size=1, max_size=6), st.integers(0, 1000))
def test_each_token_is_the_one_that_the_definitions_choose(asked: list[Sequence], seed: int) -> None:
    rows = logits(len(asked), VOCAB, seed)
    untouched = rows.clone()
    assert sample(rows, *asked) == [expected_token(row, of_row) for row, of_row in zip(rows, asked, strict=True)]
    assert torch.equal(rows, untouched)


def expected_token(row: Tensor, asked: Sequence) -> int | None:
    params = asked.request.params
    constraint = asked.constraint
    allowed = {*range(constraint.said[-1] + 1, VOCAB, 2)} if isinstance(constraint, Evens) else None
    shaped = oracle.shaped(row, asked, allowed)
    if shaped.isneginf().all():
        return None
    if params.is_greedy:
        return int(shaped.argmax())
    kept = oracle.kept_tokens(shaped, params)
    probs = [p if token in kept else 0.0 for token, p in enumerate(probs_of(shaped, params).tolist())]
    return oracle.draw(probs, asked.request.draw_seed, asked.index, asked.num_generated)


@settings(deadline=None, max_examples=15)
@given(st.lists(sequences(), min_size=2, max_size=9), st.integers(0, 1000))
def test_a_row_is_the_same_to_the_last_bit_alone_and_in_any_company(asked: list[Sequence], seed: int) -> None:
    """In one step after another, by one sampler that has seen others before."""
    rows = logits(len(asked), VOCAB, seed)
    chooser = Sampler()
    together = chooser.sample(rows, asked)
    for number in range(len(asked)):
        beside = slice(number, None, 2)
        for said in (chooser, Sampler()):
            assert same(said.sample(rows[number : number + 1], asked[number : number + 1])[0], together[number])
            assert same(said.sample(rows[beside], asked[beside])[0], together[number])


def same(first: Sampled, second: Sampled) -> bool:
    return first[:2] == second[:2] and type(first.error) is type(second.error)


@pytest.mark.parametrize("vocab", [259, 32_003])
def test_rows_of_real_widths_are_the_same_alone_and_in_any_company(vocab: int) -> None:
    """Wide enough that torch shares them out among threads."""
    fields: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 40, "top_p": 0.9},
        {"top_k": 300},
        {"min_p": 0.05, "temperature": 1.3},
        {"top_p": 0.999, "min_p": 1e-4},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"allowed_token_ids": frozenset(range(7, vocab, 3))},
    ]
    rows = logits(2 * len(fields), vocab) / 3
    asked = [sequence(seed=n, num_logprobs=n % 4 or None, **of_row) for n, of_row in enumerate(fields * 2)]
    together = Sampler().sample(rows, asked)
    for number in range(len(asked)):
        assert Sampler().sample(rows[number : number + 1], asked[number : number + 1]) == together[number : number + 1]


def test_counts_are_of_the_sequences_own_tokens_however_they_came_and_went() -> None:
    """Sequences begin and end beside each other, and are counted at some of their tokens only."""
    chooser, rows = Sampler(), torch.zeros(1, VOCAB)
    rows[0, :40] = torch.arange(40.0, 0.0, -1.0) / 10
    for generation in range(3):
        alive = [sequence(prompt=(n,), temperature=0, presence_penalty=2.0, frequency_penalty=1.0) for n in range(5)]
        for step in range(4):
            asked = alive[: 5 - (step + generation) % 3]
            said = chooser.sample(rows.expand(len(asked), -1), asked)
            for sampled, of_row in zip(said, asked, strict=True):
                assert sampled.token_id == int(oracle.shaped(rows[0], of_row).argmax())
            for number, of_row in enumerate(alive):
                of_row.append(number * step % 7)


def test_a_nucleus_ends_where_its_share_is_reached() -> None:
    probs = torch.full((1, 4), 0.25)
    keep_likeliest(probs, Likeliest(torch.tensor([[4]]), torch.tensor([[0.5]], dtype=torch.float64), 4))
    assert probs.tolist() == [[0.25, 0.25, 0.0, 0.0]]


def test_a_penalty_counts_each_token_once_and_the_prompt_for_repetition_alone() -> None:
    chooser, rows = Sampler(), torch.tensor([[10.0, 8.5, 0.0]])
    counted = sequence(prompt=(0,), temperature=0, frequency_penalty=0.5, presence_penalty=0.25)
    said = []
    for _ in range(5):
        (sampled,) = chooser.sample(rows, [counted])
        assert sampled.token_id is not None
        counted.append(sampled.token_id)
        said.append(sampled.token_id)
    assert said == [0, 0, 0, 1, 0]
    assert sample(rows, sequence(prompt=(0,), temperature=0, repetition_penalty=1.3)) == [1]
