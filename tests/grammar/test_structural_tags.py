"""Structural tags: which texts each format takes, and which formats are refused."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

import tiny
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.service.grammar.tags import MAX_TAGS, lark_of_tags
from swaplora_server.service.grammar.vocabulary import grammar_tokenizer

INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}
ANY = {"type": "any_text"}
TAG = {"type": "tag", "begin": "<a>", "content": INTEGER, "end": "</a>"}
TEXTUAL = {"type": "tag", "begin": "<b>", "content": ANY, "end": "</b>"}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<"], "tags": [TAG]}
SEPARATED = {"type": "tags_with_separator", "tags": [TAG], "separator": ","}


@cache
def tokenizer() -> LLTokenizer:
    backend = tiny.byte_tokenizer().backend_tokenizer
    return grammar_tokenizer(backend, Vocabulary(backend), tiny.VOCAB_SIZE, {tiny.EOS})


def is_taken(value: Any, text: str) -> bool:
    matcher = LLMatcher(tokenizer(), LLMatcher.grammar_from_lark(lark_of_tags(value)))
    assert not matcher.get_error()
    token_ids = tiny.byte_tokenizer().encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("format_", "taken", "refused"),
    [
        ({"type": "const_string", "value": 'a/"\x7f'}, ['a/"\x7f'], ["a", ""]),
        (INTEGER, ["12"], ["a", ""]),
        ({"type": "regex", "pattern": "a/b[0-9]+"}, ["a/b12"], ["a", "a/b"]),
        ({"type": "regex", "pattern": "a\\/b|\n"}, ["a/b", "\n"], ["a"]),
        (ANY, ["", "x\ny"], []),
        (TAG, ["<a>3</a>"], ["<a>x</a>", "<a>3", "<a>3</a>z"]),
        (TEXTUAL, ["<b>any < thing</b>", "<b></b>"], ["<b>x", "<b>x</b>y"]),
        ({"type": "sequence", "elements": [TEXTUAL, INTEGER]}, ["<b>q</b>5"], ["<b>q</b>", "5"]),
        ({"type": "sequence", "elements": [TEXTUAL, ANY]}, ["<b>q</b>", "<b>q</b>5"], ["5"]),
        ({"type": "or", "elements": [TEXTUAL, INTEGER]}, ["<b>q</b>", "5"], ["<b>q</b>5"]),
        (
            TRIGGERED | {"tags": [TAG, TEXTUAL]},
            ["", "text", "t <a>3</a> more <b>x</b>."],
            ["t <a>x", "t <c", "t <a>3"],
        ),
        (TRIGGERED | {"at_least_one": True}, ["<a>3</a>", "<a>3</a> and <a>4</a>."], ["", "x<a>3</a>"]),
        (TRIGGERED | {"stop_after_first": True}, ["", "hm", "hm <a>3</a>"], ["<a>3</a>."]),
        (TRIGGERED | {"at_least_one": True, "stop_after_first": True}, ["<a>3</a>"], ["", "<a>3</a>."]),
        (SEPARATED, ["", "<a>3</a>", "<a>3</a>,<a>4</a>"], ["<a>3</a><a>4</a>", "<a>3</a>,"]),
        (SEPARATED | {"separator": "", "at_least_one": True}, ["<a>3</a><a>4</a>"], [""]),
        (SEPARATED | {"stop_after_first": True}, ["", "<a>3</a>"], ["<a>3</a>,<a>4</a>"]),
    ],
)
def test_a_format_takes_what_it_says(format_: Mapping[str, Any], taken: list[str], refused: list[str]) -> None:
    value = {"type": "structural_tag", "format": format_}
    assert [text for text in taken if not is_taken(value, text)] == []
    assert [text for text in refused if is_taken(value, text)] == []


def nested(depth: int) -> dict[str, Any]:
    format_: dict[str, Any] = ANY
    for _ in range(depth):
        format_ = {"type": "sequence", "elements": [format_]}
    return format_


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "must be an object"),
        ({}, "structures"),
        ({"structures": [], "triggers": []}, "structures"),
        ({"structures": [{"begin": "a", "schema": {}, "end": ""}], "triggers": ["b"]}, "none of the triggers"),
        ({"format": ANY, "triggers": []}, "triggers"),
        ({"format": {}}, "format"),
        ({"format": {"type": "grammar", "grammar": "x"}}, "grammar"),
        ({"format": ANY | {"excludes": ["x"]}}, "excludes"),
        ({"format": TAG | {"end": ["a"]}}, "end"),
        ({"format": TRIGGERED | {"triggers": ["q"]}}, "none of the triggers"),
        ({"format": {"type": "sequence", "elements": [ANY, INTEGER]}}, "any_text"),
        ({"format": {"type": "sequence", "elements": [TRIGGERED, INTEGER]}}, "triggered_tags"),
        ({"format": {"type": "or", "elements": [INTEGER] * (MAX_TAGS + 1)}}, f"{MAX_TAGS} parts"),
        ({"format": nested(2000)}, "elements"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_by_name(value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        lark_of_tags(value)
    assert len(str(caught.value)) < 500
