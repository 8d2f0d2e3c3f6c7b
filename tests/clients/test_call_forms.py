"""Each form of calls: what a grammar of it lets through is read as arguments of the schema, and what it writes too."""

import json
import re
from functools import cache
from typing import Any

import jinja2
import jsonschema
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

import tiny
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.service.errors import RequestError
from swaplora_server.service.grammar.vocabulary import grammar_tokenizer
from swaplora_server.service.tools.call_format import CallFormat
from swaplora_server.service.tools.parameter_calls import QWEN3_CODER
from swaplora_server.service.tools.reader import Argued, Called, Said
from swaplora_server.service.tools.readers import FORMATS, reader_of
from swaplora_server.service.tools.tool import Parameters, Tool

OF_FORMS = pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}-{form.before[:12]}")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 9},
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
        "choice": {"$ref": "#/$defs/Choice"},
        "maybe": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
        "either": {"type": ["string", "integer"], "maxLength": 4, "minimum": 5, "maximum": 9},
        "list": {"type": "array", "items": {"type": "string", "maxLength": 14}, "maxItems": 2},
        "is_on": {"type": "boolean"},
    },
    "required": ["text", "number", "choice"],
    "$defs": {"Choice": {"enum": ["a", "b</", 3, None]}},
}
TOOLS = [Tool("full", None, Parameters(SCHEMA, json.dumps(SCHEMA)), is_strict=True), Tool("empty")]
SCHEMAS = {"full": SCHEMA, "empty": {"type": "object", "maxProperties": 0}}
LOOP = {"anyOf": [{"$ref": "#/$defs/b"}] * 10}
MANY, WIDE = [f"p{n}" for n in range(1000)], {"enum": [f"v{n}" for n in range(1000)]}
VALUES = st.fixed_dictionaries(
    {
        "text": st.text(max_size=9).filter(lambda text: "</parameter>" not in text and "\r" not in text),
        "number": st.integers(0, 99),
        "choice": st.sampled_from(["a", "b</", 3, None]),
    },
    optional={
        "maybe": st.none() | st.just("x"),
        "list": st.lists(st.sampled_from(["</parameter>", 'a"\n', "}", "[ARGS]"]), max_size=2),
        "is_on": st.booleans(),
    },
)
TEMPLATE = (  # as Qwen3-Coder's writes calls
    "{% for call in calls %}{{ '<tool_call>\\n<function=' + call.name + '>\\n' }}"
    "{% for name, value in call.arguments.items() %}{{ '<parameter=' + name + '>\\n' }}"
    "{{ value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}"
    "{{ '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}"
)


@cache
def tokenizer() -> LLTokenizer:
    backend = tiny.byte_tokenizer().backend_tokenizer
    return grammar_tokenizer(backend, Vocabulary(backend), tiny.VOCAB_SIZE, {tiny.EOS})


def arguments_in(form: CallFormat, text: str) -> list[tuple[str, Any]]:
    """The calls in a text that is nothing else."""
    reader = reader_of(form, TOOLS)
    parts = [*reader.push(text), *reader.flush()]
    assert not [part for part in parts if isinstance(part, Said)], (text, parts)
    made = [part for part in parts if isinstance(part, Called)]
    texts = ["".join(p.text for p in parts if isinstance(p, Argued) and p.number == one.number) for one in made]
    return [(one.name, json.loads(argued)) for one, argued in zip(made, texts, strict=True)]


def walked(grammar: str, data: st.DataObject) -> str:
    """Any text that a grammar lets through, the shortest way home after a while."""
    matcher = LLMatcher(tokenizer(), LLMatcher.grammar_from_lark(grammar))
    taken: list[int] = []
    seed = data.draw(st.randoms(use_true_random=False))
    while not matcher.is_stopped() and len(taken) < 600:
        forced = matcher.compute_ff_tokens()
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(tiny.VOCAB_SIZE) if mask[i // 8] >> (i % 8) & 1 and i != tiny.EOS]
        if not forced and (not allowed or (matcher.is_accepting() and len(taken) > 200)):
            break
        step = list(forced) or [seed.choice(allowed)]
        assert matcher.try_consume_tokens(step) == len(step)
        taken += step
    text: str = tiny.byte_tokenizer().decode(taken)
    return text if matcher.is_accepting() else ""


@OF_FORMS
@examples(max_examples=6)
@given(data=st.data())
def test_what_is_let_through_is_read_as_the_schema_says(form: CallFormat, data: st.DataObject) -> None:
    text = walked(form.calls_only(TOOLS, is_one=True).text, data)
    if text:
        [(name, arguments)] = arguments_in(form, text)
        jsonschema.validate(arguments, SCHEMAS[name])


@OF_FORMS
@examples(max_examples=30)
@given(values=VALUES)
def test_what_a_form_writes_is_let_through_and_read(form: CallFormat, values: dict[str, Any]) -> None:
    text = form.written([{"name": "full", "arguments": values}, {"name": "empty", "arguments": {}}])
    assert arguments_in(form, text) == [("full", values), ("empty", {})]


@OF_FORMS
def test_a_call_in_a_text_is_let_through_if_it_is_of_the_schema(form: CallFormat) -> None:
    values = {"text": "x", "number": 3, "choice": "a"}
    for call, is_taken in (
        ({"name": "full", "arguments": values}, True),
        ({"name": "full", "arguments": {**values, "number": 100}}, False),
        ({"name": "empty", "arguments": {}}, True),
    ):
        matcher = LLMatcher(tokenizer(), LLMatcher.grammar_from_lark(form.text_with_calls(TOOLS).text))
        text = re.sub('(?<=")(name|arguments|parameters)":', r'\1": ', form.written([call])).replace(',"arg', ', "arg')
        token_ids = tiny.byte_tokenizer().encode(text.replace(',"param', ', "param'), add_special_tokens=False)
        assert (matcher.try_consume_tokens(token_ids) == len(token_ids)) == is_taken, call


@given(values=VALUES)
def test_calls_come_back_out_of_the_template_that_wrote_them(values: dict[str, Any]) -> None:
    text = jinja2.Template(TEMPLATE).render(calls=[{"name": "full", "arguments": values}])
    assert arguments_in(QWEN3_CODER, text) == [("full", values)]


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"type": "object", "properties": {}, "required": ["gone"]}, "gone"),
        ({"type": "object", "properties": {"a>": {}}}, "a>"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "^a"}}}, "pattern"),
        ({"type": "object", "properties": {"a": {"anyOf": [{"type": "string", "format": "date"}]}}}, "format"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": LOOP}}, "alternatives"),
        ({"type": "object", "properties": {n: {"$ref": "#/$defs/b"} for n in MANY}, "$defs": {"b": WIDE}}, "so much"),
    ],
)
def test_what_cannot_be_held_to_without_quotes_is_refused_by_name(parameters: dict[str, Any], told: str) -> None:
    tool = Tool("a", None, Parameters(parameters, json.dumps(parameters)))
    with pytest.raises(RequestError, match=told):
        QWEN3_CODER.calls_only([tool], is_one=True)
    assert QWEN3_CODER.text_with_calls([tool])
