"""How good an answer is: pure functions of the item and what was said. Each score is from 0 to 1."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic_core import from_json

from swaplora_server.evaluation.task import Item, Kind
from swaplora_server.evaluation.validators import regex_validator, schema_validator

# of each kind of item; the first is its score, right or wrong
METRICS: Mapping[Kind, tuple[str, ...]] = {
    "answer": ("exact_match", "token_f1"),
    "choices": ("acc_norm", "acc"),
    "schema": ("valid_json",),
    "regex": ("regex",),
}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_scores(item: Item, text: str) -> list[float]:
    """Those of METRICS for an item without choices, of the text that was generated."""
    if item.answer is not None:
        return [float(exact_match(item.answer, text)), token_f1(item.answer, text)]
    if item.schema_ is not None:
        return [float(is_valid_json(item.schema_, text))]
    assert item.regex is not None
    return [float(regex_validator(item.regex).is_valid(text))]


def choice_scores(item: Item, logprobs: Sequence[float]) -> list[float]:
    """Those of METRICS for an item with choices, of the natural-log probability of each after the prompt.

    As lm-eval has them: `acc` takes the likeliest, `acc_norm` the likeliest a character, so that long ones are not
    behind for their length. Of equals the first counts.
    """
    assert item.choices is not None
    per_character = [logprob / len(choice) for logprob, choice in zip(logprobs, item.choices, strict=True)]
    return [float(_first_largest(each) == item.correct) for each in (per_character, logprobs)]


def exact_match(wanted: str, text: str) -> bool:
    """Whether they are the same but for space around them."""
    return wanted.strip() == text.strip()


def token_f1(wanted: str, text: str) -> float:
    """The harmonic mean of precision and recall over words, as SQuAD has it (arXiv 1606.05250).

    Case, punctuation and articles do not count. Two texts without words are alike.
    """
    words, said = _words(wanted), _words(text)
    if not (words and said):
        return float(words == said)
    num_common = (Counter(words) & Counter(said)).total()
    return 2 * num_common / (len(words) + len(said))


def is_valid_json(schema: dict[str, object] | bool, text: str) -> bool:
    """Whether the whole text is JSON, and valid against the schema; formats are not looked at."""
    try:
        value = from_json(text, allow_inf_nan=False)
        return schema_validator(schema).is_valid(value)
    except ValueError:
        return False


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
