"""Metrics and intervals, against values that were worked out by hand or are in the literature."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaplora_server.evaluation import statistics
from swaplora_server.evaluation.metrics import METRICS, answer_scores, choice_scores, is_valid_json, token_f1
from swaplora_server.evaluation.results import comparisons, metrics_of
from swaplora_server.evaluation.statistics import Z, mcnemar, wilson_interval
from swaplora_server.evaluation.task import KINDS, parse_task


def scores(held_to: str, text: str) -> list[float]:
    [item] = parse_task(f'{{"prompt": "a", {held_to}}}').items
    return answer_scores(item, text)


def test_each_kind_has_its_metrics() -> None:
    assert set(METRICS) == set(KINDS)
    assert scores('"answer": "The cat."', " The cat.\n") == [1.0, 1.0]
    assert scores('"answer": "the cat"', "The cat") == [0.0, 1.0]
    assert scores('"regex": "^[0-9]{3}$"', "123") == [1.0]
    assert scores('"regex": "^[0-9]{3}$"', "a123") == [0.0]
    assert scores('"regex": "[0-9]{3}"', "a123") == [1.0]
    assert scores('"schema": {"type": "object", "required": ["a"]}', ' {"a": 1}\n') == [1.0]
    assert scores('"schema": {"type": "object", "required": ["a"]}', '{"b": 1}') == [0.0]


def test_a_regex_takes_no_longer_for_a_text_that_it_almost_matches() -> None:
    """Of one that backtracks this would be the last that is heard."""
    assert scores('"regex": "^(a|a)*$"', "a" * 4000 + "b") == [0.0]
    assert not is_valid_json({"pattern": "^(a|a)*$"}, f'"{"a" * 4000}b"')


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": 1} and more', "NaN", '```json\n{"a": 1}\n```', "[" * 5000, '{"a": Infinity}', '"\\ud800"']
)
def test_what_is_no_json_is_not_valid(text: str) -> None:
    assert not is_valid_json(True, text)
    assert is_valid_json(True, "1" * 500)


@pytest.mark.parametrize(
    ("wanted", "text", "f1"),
    [
        ("the cat sat", "a cat sat down!", 0.8),  # 2 of 3 said, 2 of 2 wanted
        ("a b b", "b b c", 0.8),  # the article does not count: 2 of 2, 2 of 3
        ("", "", 1.0),
        ("", "word", 0.0),
        ("word", "", 0.0),
        ("yes", "no", 0.0),
    ],
)
def test_token_f1_is_squads(wanted: str, text: str, f1: float) -> None:
    assert token_f1(wanted, text) == pytest.approx(f1)


def test_a_choice_is_taken_by_its_likelihood_a_character_and_plain() -> None:
    [item] = parse_task('{"prompt": "a", "choices": [" no", " certainly"], "correct": 1}').items
    assert choice_scores(item, [-3.0, -5.0]) == [1.0, 0.0]  # -1 and -0.5 a character
    assert choice_scores(item, [-3.0, -12.0]) == [0.0, 0.0]
    assert choice_scores(item, [-3.0, -2.0]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("mean", "num", "low", "high"),
    [
        (0.8, 10, 0.4901625, 0.9433178),  # R: prop.test(8, 10, correct = FALSE)
        (0.0, 10, 0.0, 0.2775328),
        (1.0, 1, 0.2065493, 1.0),
        (0.5, 100, 0.4038315, 0.5961685),
    ],
)
def test_wilsons_interval(mean: float, num: int, low: float, high: float) -> None:
    assert wilson_interval(mean, num) == pytest.approx((low, high), abs=1e-7)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_an_interval_holds_its_mean_and_is_the_score_tests(num: int, mean: float) -> None:
    low, high = wilson_interval(mean, num)
    assert 0 <= low <= mean <= high <= 1
    for end in (low, high):  # where the score test is just at its level: (mean - end)² n = z² end (1 - end)
        assert (mean - end) ** 2 * num == pytest.approx(Z**2 * end * (1 - end), rel=1e-6, abs=1e-6)
    wider = wilson_interval(mean, max(1, num // 2))
    assert wider[1] - wider[0] >= high - low - 1e-12


def test_no_items_have_no_interval() -> None:
    for mean, num in ((0.5, 0), (1.1, 3), (math.nan, 3)):
        with pytest.raises(ValueError, match="rate"):
            wilson_interval(mean, num)


@pytest.mark.parametrize(
    ("first", "second", "p_value"),
    [
        (0, 0, 1.0),
        (5, 15, 43400 / 2**20),  # 2 (1 + 20 + 190 + 1140 + 4845 + 15504) / 2^20
        (1, 5, 14 / 64),
        (0, 1, 1.0),
        (3, 3, 1.0),
        (700, 600, math.erfc(99 / math.sqrt(1300) / math.sqrt(2))),
    ],
)
def test_mcnemars_test(first: int, second: int, p_value: float) -> None:
    assert mcnemar(first, second) == pytest.approx(p_value)
    assert mcnemar(second, first) == mcnemar(first, second)


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_p_value_is_one_and_falls_with_the_difference(first: int, second: int) -> None:
    assert 0 < mcnemar(first, second) <= 1
    if first > second:
        assert mcnemar(first + 1, second) <= mcnemar(first, second)


def test_the_two_forms_of_the_test_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(500 + difference, 500 - difference) for difference in (5, 15, 30)]
    exact = [mcnemar(*case) for case in cases]
    monkeypatch.setattr(statistics, "MAX_EXACT", 0)
    assert [mcnemar(*case) for case in cases] == pytest.approx(exact, rel=0.05)


def test_results_count_what_was_answered_alone() -> None:
    kinds = parse_task(
        [
            {"prompt": "a", "answer": "b"},
            {"prompt": "a", "regex": "b"},
            {"prompt": "a", "answer": "b"},
            {"prompt": "a", "regex": "b"},
        ]
    ).items
    named = [item.kind for item in kinds]
    first, second = [[0.0, 0.5], [1.0], None, [1.0]], [[1.0, 1.0], [0.0], [1.0, 1.0], [0.0]]
    told = metrics_of(named, first)
    assert {name: (each["num"], each["mean"]) for name, each in told.items()} == {
        "score": (3, pytest.approx(2 / 3)),
        "exact_match": (1, 0.0),
        "token_f1": (1, 0.5),
        "regex": (2, 1.0),
    }
    [pair] = comparisons(["one", "two"], [first, second])
    assert (pair["models"], pair["num"], pair["only_first"], pair["only_second"]) == (["one", "two"], 3, 2, 1)
    assert pair["p_value"] == mcnemar(2, 1)
    assert metrics_of(named, [None] * 4) == {}
