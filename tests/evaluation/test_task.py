"""Task files: what is one, what is none and where it is wrong, and a digest that spelling does not change."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swaplora_server.evaluation import task as task_module
from swaplora_server.evaluation.metrics import answer_scores
from swaplora_server.evaluation.task import KINDS, MAX_ITEM_BYTES, TaskError, parse_task

WORDS = st.text(min_size=1, max_size=20).filter(str.strip)
ASKED = st.one_of(
    st.fixed_dictionaries({"prompt": WORDS}),
    st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": WORDS, "content": st.text()}), min_size=1, max_size=3)}
    ),
)
HELD_TO = st.one_of(
    st.fixed_dictionaries({"answer": st.text(max_size=20)}),
    st.fixed_dictionaries(
        {"choices": st.lists(WORDS, min_size=2, max_size=4, unique=True), "correct": st.integers(0, 1)}
    ),
    st.fixed_dictionaries(
        {
            "schema": st.sampled_from(
                [True, {"type": "array", "items": {"type": "object", "minProperties": 1}}, {"enum": ["é", None]}]
            )
        }
    ),
    st.fixed_dictionaries({"regex": st.sampled_from(["a+", "^yes|no$", r"\d{2}"])}),
)
ITEMS = st.lists(st.tuples(ASKED, HELD_TO).map(lambda both: both[0] | both[1]), min_size=1, max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def reversed_keys(value: Any) -> Any:
    """The same JSON value, the keys of each object in the other order."""
    if isinstance(value, list):
        return [reversed_keys(one) for one in value]
    return {key: reversed_keys(value[key]) for key in reversed(value)} if isinstance(value, dict) else value


@settings(max_examples=50)
@given(ITEMS, st.booleans())
def test_text_and_list_are_the_same_task_however_it_is_spelt(items: list[dict[str, Any]], is_ascii: bool) -> None:
    text = "\n\n".join(json.dumps(reversed_keys(item), ensure_ascii=is_ascii) for item in items) + "\n"
    from_text, from_list = parse_task(text), parse_task(items)
    assert from_text == from_list
    assert [item.kind for item in from_list.items] == [next(kind for kind in KINDS if kind in item) for item in items]
    others = [*items, items[0]]
    assert parse_task(others).digest != from_list.digest


@given(st.text() | st.lists(JSON, max_size=3) | JSON.map(lambda value: json.dumps(value)))
def test_whatever_comes_is_a_task_or_refused(given_: Any) -> None:
    with suppress(TaskError):
        assert parse_task(given_).items


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ('{"prompt": "a"}', "give exactly one of answer, choices, schema, regex"),
        ('{"prompt": "a", "answer": "b", "regex": "c"}', "give exactly one of answer, choices, schema, regex"),
        ('{"answer": "b"}', "give exactly one of prompt and messages"),
        (
            '{"prompt": "a", "messages": [{"role": "user", "content": "b"}], "answer": "c"}',
            "give exactly one of prompt",
        ),
        ('{"prompt": " ", "answer": "b"}', "prompt: must not be blank"),
        ('{"prompt": "a", "answer": 3}', "answer: Input should be a valid string"),
        ('{"prompt": "a", "answer": null}', "answer: null says nothing"),
        ('{"prompt": "a", "answr": "b"}', "answr: "),
        ('{"prompt": "a", "answer": "b", "correct": 0}', "correct: "),
        ('{"prompt": "a", "choices": ["b", "c"]}', "correct: must say which"),
        ('{"prompt": "a", "choices": ["b", "c"], "correct": 2}', "correct: must say which"),
        ('{"prompt": "a", "choices": ["b", "c"], "correct": true}', "correct: "),
        ('{"prompt": "a", "choices": ["b"], "correct": 0}', "choices: "),
        ('{"prompt": "a", "choices": ["b", "b"], "correct": 0}', "choices: must be texts"),
        ('{"prompt": "a", "choices": ["b", 3], "correct": 0}', "choices.1: "),
        ('{"messages": [{"role": "user"}], "answer": "b"}', "messages.0.content: "),
        ('{"prompt": "a", "schema": {"type": "nope"}}', "schema: "),
        ('{"prompt": "a", "schema": {"$ref": "http://127.0.0.1/x"}}', "schema: "),
        ('{"prompt": "a", "schema": {"$ref": "file:///etc/passwd"}}', "schema: "),
        ('{"prompt": "a", "regex": "("}', "regex: "),
        ('{"prompt": "a", "regex": "(?=a)"}', "regex: "),
        ('{"prompt": "a", "regex": "((a{999}){999}){999}"}', "regex: "),
        ("[1]", "must be an object"),
        ('{"prompt": "a", "prompt": "b", "answer": "c"}', "appears twice"),
        ('{"prompt": "a", "schema": {"const": NaN}}', "NaN is not a JSON number"),
        ('{"prompt": "a", "answer": "\\ud800"}', "lone surrogate"),
        ("nope", "is not JSON"),
        (f'{{"prompt": "{"a" * MAX_ITEM_BYTES}", "answer": "b"}}', "is larger than"),
        ('{"prompt": "a", "schema": ' + '{"items": ' * 100 + "{}" + "}" * 101, "is nested deeper"),
    ],
)
def test_a_complaint_names_the_line_and_the_key(item: str, complaint: str) -> None:
    with pytest.raises(TaskError) as refused:
        parse_task('{"prompt": "fine", "answer": ""}\n\n' + item)
    assert str(refused.value).startswith("line 3")
    assert complaint in str(refused.value)


CHAIN = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(30)} | {"a30": {"type": "object"}}
LONG_CHAIN = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(3000)} | {"a3000": True}


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"$ref": "#/$defs/a0", "$defs": CHAIN}, "more than 4096 objects"),
        ({"properties": {"definitions": {"$ref": "#/$defs/a0"}}, "$defs": CHAIN}, "more than 4096 objects"),
        ({"$ref": "#/$defs/a29", "$defs": CHAIN, "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"items": {"unevaluatedItems": False}}, "unevaluatedItems"),
        ({"items": {"$dynamicRef": "#"}}, "$dynamicRef"),
        ({"properties": {"properties": {"unevaluatedItems": False}}}, "unevaluatedItems"),
        ({"$ref": "#/properties", "properties": {"unevaluatedItems": False}}, "unevaluatedItems"),
        ({"x": {"dependentSchemas": {"a": {"unevaluatedProperties": False}}}}, "unevaluatedProperties"),
        ({"allOf": [{"$ref": "#"}]}, "may not contain itself"),
        ({"allOf": [{"items": {"$ref": "#"}}] * 2}, "may not contain itself"),
        ({"$ref": "#/$defs/a0", "$defs": LONG_CHAIN}, "nested deeper than 256"),
        ({"$ref": "#a", "$defs": {"a": {"$anchor": "a"}}}, "'#a' is not in the schema"),
        ({"$ref": "#/%24defs/a", "$defs": {"a": True}}, "is not in the schema"),
        ({"$ref": "#/$defs/b", "$defs": {"a": True}}, "there is no '#/$defs/b'"),
        ({"items": {"$id": "urn:x", "$ref": "#/a"}, "a": True}, "$id is for the whole"),
    ],
)
def test_a_schema_that_unfolds_to_much_is_refused_by_name(schema: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TaskError) as refused:
        parse_task([{"prompt": "a", "schema": schema}])
    assert str(refused.value).startswith("task[0]: schema: ")
    assert complaint in str(refused.value)


def test_a_name_is_no_keyword() -> None:
    names = {"unevaluatedItems": {"type": "integer"}, "$dynamicRef": {}, "properties": {"properties": {"$id": {}}}}
    schema = {"properties": names, "$defs": {"unevaluatedProperties": True}, "dependencies": {"$recursiveRef": ["a"]}}
    [item] = parse_task([{"prompt": "a", "schema": schema}]).items
    assert answer_scores(item, '{"unevaluatedItems": 1}') == [1.0]
    assert answer_scores(item, '{"unevaluatedItems": "1"}') == [0.0]


def test_a_schema_may_name_a_part_of_it_again_and_again() -> None:
    name = {"type": "string", "pattern": "^[a-z]+$"}
    schema = {
        "$id": "https://example.com/pair",
        "type": "object",
        "properties": {"id": {"$ref": "#/$defs/name"}, "more": {"items": {"$ref": "#/$defs/name"}}},
        "$defs": {"name": name},
    }
    [item] = parse_task([{"prompt": "a", "schema": schema}]).items
    assert answer_scores(item, '{"id": "x", "more": ["y", "z"]}') == [1.0]
    assert answer_scores(item, '{"id": "x", "more": ["y", "Z"]}') == [0.0]


def test_a_complaint_about_a_list_names_the_place_in_it() -> None:
    with pytest.raises(TaskError, match=r"^task\[1\]: regex: "):
        parse_task([{"prompt": "a", "answer": "b"}, {"prompt": "a", "regex": 3}])


def test_a_task_is_bounded_and_has_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    item = {"prompt": "a", "answer": "b"}
    nothing: tuple[str | list[Any], ...] = ("", "\n \n", [])
    for empty in nothing:
        with pytest.raises(TaskError, match="no item"):
            parse_task(empty)
    monkeypatch.setattr(task_module, "MAX_ITEMS", 2)
    with pytest.raises(TaskError, match="line 3: a task may have 2 items"):
        parse_task("\n".join([json.dumps(item)] * 3))
    monkeypatch.setattr(task_module, "MAX_TASK_BYTES", 64)
    for given_ in (json.dumps({"prompt": "é" * 30, "answer": "b"}, ensure_ascii=False), [item | {"prompt": "a" * 60}]):
        with pytest.raises(TaskError, match="may have 64 bytes"):
            parse_task(given_)
