"""Answers that keep to a format: JSON of a schema, a regular expression, a choice, a grammar."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

import tiny
from schema_cases import distinct_cases, schema_case
from serving import BASE, Running, serving, settings
from swaplora_server.engine.request import Sequence
from swaplora_server.engine.scheduling.live import Live

NUM_CASES = 500
SPACES = {str(token_id): -100 for token_id in tiny.byte_tokenizer().encode(" \n\r\t")}  # or all would be of them
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "user", None]},
    },
    "required": ["name", "age", "role"],
    "additionalProperties": False,
}
LARK = 'start: "<" WORD ("," WORD)? ">"\nWORD: /[a-c]{1,3}/'
GBNF = 'root ::= "<" word ("," word)? ">"\nword ::= [a-c] [a-c]? [a-c]?'
IN_ANGLES = "<[a-c]{1,3}(,[a-c]{1,3})?>"
TAG: dict[str, Any] = {"structures": [{"begin": "<f>", "schema": PERSON, "end": "</f>"}], "triggers": ["<f"]}
FORMAT = {
    "type": "triggered_tags",
    "triggers": ["<f"],
    "tags": [{"begin": "<f>", "content": {"type": "json_schema", "json_schema": PERSON}, "end": "</f>"}],
}


@pytest.fixture(scope="module")
def server(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With two adapters, and all that waits let in."""
    config = settings(
        base, tmp_path_factory.mktemp("data"), max_waiting=2048, max_num_seqs=256, kv_cache_bytes=32 << 20
    )
    with serving(config) as running:
        for name, folder in zip("ab", adapters[3:5], strict=True):
            assert running.put(name, folder).status_code == 201
        yield running


def complete(server: Running, **fields: Any) -> httpx.Response:
    body = {"model": BASE, "prompt": "hi", "max_tokens": 300, "seed": 5, "logit_bias": SPACES}
    return server.client.post("/v1/completions", json=body | fields)


def choices(answer: httpx.Response) -> list[tuple[str, str]]:
    """Text and finish reason of each."""
    assert answer.status_code == 200, answer.text
    return [(choice["text"], choice["finish_reason"]) for choice in answer.json()["choices"]]


def refusal(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


async def test_what_a_model_that_would_say_anything_answers_is_of_the_schema(server: Running) -> None:
    cases = distinct_cases(NUM_CASES)
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        few = asyncio.Semaphore(32)

        async def ask(number: int) -> tuple[int, httpx.Response]:
            body = {
                "model": [BASE, "a", "b"][number % 3],
                "prompt": f"case {number % 7}",
                "max_tokens": 450,
                "seed": number,
                "temperature": 1.0 if number % 4 else 0,
                "logit_bias": SPACES,
                "response_format": {"type": "json_schema", "json_schema": {"schema": cases[number]}},
            }
            async with few:  # no more than may wait to be compiled
                return number, await client.post("/v1/completions", json=body)

        for number, answer in await asyncio.gather(*map(ask, range(NUM_CASES))):
            schema = cases[number]
            [(text, reason)] = choices(answer)
            assert reason == "stop", f"{schema} {text}"
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


FORMS: list[tuple[dict[str, Any], str | None]] = [
    ({"response_format": {"type": "json_object", "schema": PERSON}}, None),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}},
        None,
    ),
    ({"structured_outputs": {"json": PERSON}}, None),
    ({"structured_outputs": {"json": json.dumps(PERSON)}}, None),
    ({"structured_outputs": {"regex": "[0-9]{2,4}x"}}, "[0-9]{2,4}x"),
    ({"structured_outputs": {"choice": ["yes", 'no"\n', "é😀\x7f"]}}, '(yes|no"\n|é😀\x7f)'),
    ({"structured_outputs": {"grammar": LARK}}, IN_ANGLES),
    ({"structured_outputs": {"grammar": GBNF}}, IN_ANGLES),
    ({"guided_json": PERSON}, None),
    ({"guided_json": json.dumps(PERSON)}, None),
    ({"guided_json": f" {json.dumps(PERSON, indent=1)} \n"}, None),
    ({"guided_json": PERSON | {"x-guidance": {"item_separator": ","}}}, None),
    ({"guided_regex": "^a+$"}, "a+"),
    ({"guided_choice": ["left"]}, "left"),
    ({"guided_grammar": GBNF}, IN_ANGLES),
    ({"json_schema": json.dumps(PERSON)}, None),
    ({"json_schema": PERSON}, None),
    ({"regex": "[xy]{3}"}, "[xy]{3}"),
    ({"ebnf": GBNF}, IN_ANGLES),
    ({"grammar": GBNF}, IN_ANGLES),
]


@pytest.mark.parametrize(("fields", "expression"), FORMS, ids=lambda value: str(value)[:40])
def test_every_server_s_own_field_is_kept_to(server: Running, fields: dict[str, Any], expression: str | None) -> None:
    for text, reason in choices(complete(server, n=3, **fields)):
        assert reason == "stop"
        if expression is None:
            jsonschema.validate(json.loads(text), PERSON)
        else:
            assert re.fullmatch(expression, text)


def test_without_a_schema_the_text_is_some_object(server: Running) -> None:
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
        {"structured_outputs": {"json_object": True}},
    ):
        closing = {**SPACES, str(ord("}") - 33): 12, str(ord('"') - 33): 12}  # or it would take long to end
        [(text, reason)] = choices(complete(server, logit_bias=closing, **fields))
        assert (type(json.loads(text)), reason) == (dict, "stop")


def test_text_goes_on_around_a_structural_tag_and_within_it_is_of_its_schema(server: Running) -> None:
    tagged = {str(token_id): 30 for token_id in tiny.byte_tokenizer().encode("<f")}
    texts = [
        text
        for fields in (
            {"structured_outputs": {"structural_tag": TAG}},
            {"structural_tag": json.dumps(TAG)},
            {"response_format": TAG | {"type": "structural_tag"}},
            {"response_format": {"type": "structural_tag", "format": FORMAT}},
        )
        for text, _ in choices(complete(server, n=4, logit_bias=tagged | SPACES, **fields))
    ]
    found = [re.findall("<f>(.*?)</f>", text, re.DOTALL) for text in texts]
    assert all(any(found[start : start + 4]) for start in range(0, len(found), 4))
    for inside in [inside for insides in found for inside in insides]:
        jsonschema.validate(json.loads(inside), PERSON)


def test_a_chat_streams_it_with_its_logprobs(server: Running) -> None:
    body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 300, "seed": 3}
    body |= {"logit_bias": SPACES, "logprobs": True, "guided_json": PERSON}
    whole = server.client.post("/v1/chat/completions", json=body).json()["choices"][0]
    jsonschema.validate(json.loads(whole["message"]["content"]), PERSON)
    streamed = server.client.post("/v1/chat/completions", json=body | {"stream": True}).text
    chunks = [json.loads(line[6:])["choices"][0] for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
    tokens = [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["content"]]
    assert tokens == whole["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == whole["message"]["content"]
    assert [chunk["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]


def test_the_end_comes_where_the_format_lets_it_and_nowhere_else(server: Running) -> None:
    digits = {"structured_outputs": {"regex": "[0-9]+"}}
    for text, reason in choices(complete(server, n=8, min_tokens=5, **digits)):
        assert reason == "stop"
        assert len(text) >= 4
    assert choices(complete(server, max_tokens=9, ignore_eos=True, **digits))[0][1] == "length"
    likely_end = {str(tiny.EOS): 100}
    assert choices(complete(server, logit_bias=likely_end, n=2, **digits)) == [
        (text, "stop") for text, _ in choices(complete(server, logit_bias=likely_end, n=2, regex="[0-9]"))
    ]
    # any token that ends a text may end this one, and none may that is a part of it only by its name
    pad = complete(server, stop_token_ids=[tiny.PAD], ignore_eos=True, logit_bias={str(tiny.PAD): 100}, **digits)
    assert re.fullmatch("[0-9]", choices(pad)[0][0])


def test_a_format_that_allows_nothing_more_ends_the_answer(server: Running) -> None:
    for fields in ({}, {"ignore_eos": True}, {"min_tokens": 20}, {"max_tokens": 3}):
        answer = complete(server, structured_outputs={"choice": ["abc"]}, return_token_ids=True, **fields)
        assert choices(answer) == [("abc", "stop")]
        assert answer.json()["choices"][0]["token_ids"] == tiny.byte_tokenizer().encode("abc")
        assert answer.json()["usage"]["completion_tokens"] == 3
    assert choices(complete(server, structured_outputs={"choice": ["abc"]}, max_tokens=2)) == [("ab", "length")]
    assert choices(complete(server, structured_outputs={"choice": ["abc"]}, stop="b")) == [("a", "stop")]


def test_other_fields_go_with_a_format(server: Running) -> None:
    digits = {"structured_outputs": {"regex": "[0-9]{4}"}}
    evens = tiny.byte_tokenizer().encode("02468")
    assert re.fullmatch("[02468]{4}", choices(complete(server, allowed_token_ids=evens, **digits))[0][0])
    sevens = complete(server, logit_bias={str(tiny.byte_tokenizer().encode("7")[0]): 100}, **digits)
    assert choices(sevens) == [("7777", "stop")]
    summed = {"adapters": [{"name": "a", "scale": 0.5}, {"name": "b", "scale": -1.0}]}
    assert re.fullmatch("[0-9]{4}", choices(complete(server, **summed, **digits))[0][0])
    error = refusal(complete(server, allowed_token_ids=[tiny.EOS], **digits))
    assert (error["code"], "no token may come next" in error["message"]) == ("invalid_request", True)


def test_a_seed_gives_one_text_alone_in_company_and_after_preemption(
    base: Path, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats: list[dict[str, Any]] = [
        *({"guided_json": PERSON}, {"guided_json": schema_case(9)}, {"regex": "[a-z ]{30}"}, {}) * 2,
        {"regex": "[a-z ]{90}", "n": 8},  # together more than the small cache holds
    ]
    bodies = [
        {"model": BASE, "prompt": f"{number}", "seed": number, "max_tokens": 120, "logit_bias": SPACES, **fields}
        for number, fields in enumerate(formats)
    ]
    alone = [choices(server.client.post("/v1/completions", json=body)) for body in bodies]

    async def together(url: str) -> list[Any]:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        return [choices(answer) for answer in answers]

    assert asyncio.run(together(server.url)) == alone
    preempted, preempt = [], Live.preempt

    def noting(self: Live, sequence: Sequence) -> None:
        preempted.append(sequence)
        preempt(self, sequence)

    monkeypatch.setattr(Live, "preempt", noting)
    with serving(settings(base, tmp_path, kv_cache_bytes=80 << 10, max_model_len=160)) as small:
        assert asyncio.run(together(small.url)) == alone
    assert preempted, "there was room for all"


FORCING: list[dict[str, Any]] = [
    {"regex": "abcdefghijkl[0-9]mnopqr[a-f]{2}stu"},
    {"guided_json": PERSON},
    {"guided_json": PERSON, "n": 3, "temperature": 1.3, "top_k": 20},
    {"guided_json": PERSON, "stop": ['"age']},
    {"guided_json": PERSON, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"regex": "abcdefghijkl[0-9]", "max_tokens": 7},
    {"regex": "abcdefghijkl[0-9]", "min_tokens": 20},
    {"regex": "abcdefghijkl", "stop_token_ids": tiny.byte_tokenizer().encode("f")},
    {"guided_choice": ["ab" * 60, "cd" * 60]},
    {"model": "a", "guided_json": PERSON},
]


@pytest.mark.parametrize("fields", FORCING, ids=str)
def test_tokens_that_nothing_can_replace_take_no_step_and_change_none(server: Running, fields: dict[str, Any]) -> None:
    """Where log-probabilities are asked for, each token has a step of its own."""
    took = []
    answers = []
    for more in ({}, {"logprobs": 1}):
        before = server.service.engine.snapshot().num_steps
        answers.append(complete(server, return_token_ids=True, **fields, **more).json())
        after = server.service.engine.snapshot().num_steps
        took.append(sum(after.values()) - sum(before.values()))
    skipping, stepping = [
        [(choice["text"], choice["token_ids"], choice["finish_reason"]) for choice in answer["choices"]]
        for answer in answers
    ]
    assert skipping == stepping
    assert answers[0]["usage"] == answers[1]["usage"]
    assert took[0] < took[1]


NO_OBJECT: list[Any] = [1, True, "json", [], [{}]]
NO_SCHEMA: list[Any] = [1, 1.5, []]
NO_TEXT: list[Any] = [1, {}, []]
BAD: list[tuple[dict[str, Any], str, str]] = [
    *(({field: value}, field, field) for field in ("response_format", "structured_outputs") for value in NO_OBJECT),
    *(({field: value}, field, field) for field in ("guided_json", "json_schema") for value in NO_SCHEMA),
    *(({field: value}, field, field) for field in ("guided_regex", "regex", "ebnf", "grammar") for value in NO_TEXT),
    ({"guided_choice": "a"}, "guided_choice", "array"),
    ({"guided_choice": [1]}, "guided_choice[0]", "string"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "empty"),
    ({"structured_outputs": {}}, "structured_outputs", "one of"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", "structured_outputs.json and"),
    ({"structured_outputs": {"whitespace_pattern": "a"}}, "structured_outputs.whitespace_pattern", "Extra"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {}}, "response_format.type", "required"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needed"),
    ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "'text'"),
    ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format.json_schema", "json_object"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
        "response_format.json_schema.schema",
        "schema",
    ),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "structures"),
    ({"response_format": {"type": "structural_tag", "format": "text"}}, "response_format.format", "an object"),
    ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format", "format: "),
    ({"response_format": {"type": "structural_tag", "schema": {}}}, "response_format.schema", "structural_tag"),
    ({"response_format": {"type": "json_object", "triggers": []}}, "response_format.triggers", "json_object"),
    ({"response_format": {"type": "structural_tag"} | TAG | {"format": FORMAT}}, "response_format", "Extra"),
    ({"response_format": {"type": "structural_tag", "x": 1}}, "response_format.x", "Extra"),
    ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "guided_json and guided_regex"),
    (
        {"response_format": {"type": "json_object"}, "regex": "a"},
        "regex",
        "response_format and regex exclude each other",
    ),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
    ({"guided_regex": r"(a)\1"}, "guided_regex", "backreferences"),
    ({"guided_regex": "(" * 5000 + ")" * 5000}, "guided_regex", "nest"),
    ({"regex": "()"}, "regex", "empty"),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"guided_json": "[1]"}, "guided_json", "schema"),
    ({"guided_json": "[" * 100_000}, "guided_json", "deep"),
    ({"guided_json": {"not": {"type": "string"}}}, "guided_json", '"not"'),
    ({"guided_json": {"x-guidance": {"lenient": True}, "not": {}}}, "guided_json", '"not"'),
    ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
    ({"guided_json": {"type": "strin"}}, "guided_json", "strin"),
    ({"guided_json": {"type": "string", "format": "nope"}}, "guided_json", "nope"),
    ({"guided_json": {"type": "integer", "minimum": 5, "maximum": 3}}, "guided_json", "minimum"),
    ({"guided_json": {"$ref": "https://example.com/s.json"}}, "guided_json", "https://example.com/s.json"),
    ({"guided_json": {"$ref": "file:///etc/passwd"}}, "guided_json", "file:///etc/passwd"),
    ({"guided_json": {"$ref": "#/$defs/gone"}}, "guided_json", "gone"),
    ({"guided_json": {"const": "x" * 300_000}}, "guided_json", "bytes"),
    ({"guided_choice": ["x" * 99_999] * 3}, "guided_choice", "bytes"),
    ({"structural_tag": TAG | {"structures": TAG["structures"] * 257}}, "structural_tag", "256"),
    ({"structural_tag": {"x": "x" * 300_000}}, "structural_tag", "bytes"),
    ({"response_format": {"type": "json_object", "schema": "{}"}}, "response_format.schema", "an object"),
    ({"grammar": "\n" * 9999}, "grammar", "neither"),
    ({"guided_json": {"$ref": "#"}}, "guided_json", "followed"),
    ({"grammar": "nonsense"}, "grammar", "neither"),
    ({"grammar": 'root ::= "a'}, "grammar", "neither"),
    ({"ebnf": "start: gone"}, "ebnf", "gone"),
    ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "grammar", "nested"),
    ({"structured_outputs": {"structural_tag": {"format": {}}}}, "structured_outputs.structural_tag", "format"),
    (
        {"structural_tag": {"structures": [{"begin": "a", "schema": {}, "end": ""}], "triggers": ["b"]}},
        "structural_tag",
        "triggers",
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=lambda value: str(value)[:50])
def test_a_format_that_cannot_be_kept_to_is_refused_by_name(
    server: Running, fields: dict[str, Any], param: str, words: str
) -> None:
    error = refusal(complete(server, **fields))
    assert error["code"] == "invalid_request"
    assert error["param"].startswith(param)
    assert words in error["message"]
    assert len(error["message"]) < 1500
    assert "/work" not in error["message"]
    assert "%json" not in error["message"], "which is none of the client's"


def test_rules_that_name_each_other_one_by_one_are_followed_however_many(server: Running) -> None:
    """Each is descended into from the one before: so they need a stack of some size, or the process would end."""
    rules = "".join(f"a{number}: a{number + 1}\n" for number in range(12_000))
    assert choices(complete(server, grammar=f'start: a0\n{rules}a12000: "x"\n')) == [("x", "stop")]
    chained = {f"a{number}": {"$ref": f"#/$defs/a{number + 1}"} for number in range(4000)} | {"a4000": {"const": 1}}
    assert choices(complete(server, guided_json={"$ref": "#/$defs/a0", "$defs": chained})) == [("1", "stop")]


def test_one_of_many_thousands_is_chosen(server: Running) -> None:
    many = [f"{number:05d} of {number % 7}" for number in range(10_000)]
    for text, reason in choices(complete(server, guided_choice=many, n=3)):
        assert (text in many, reason) == (True, "stop")


def test_a_format_that_fails_on_the_way_ends_its_request_alone(server: Running) -> None:
    hostile = "(a{1,100}){1,100}{1,100}"  # more expressions than may be made of it, after some tokens
    error = refusal(complete(server, regex=hostile, ignore_eos=True))
    assert error["code"] == "invalid_request"
    assert "cannot be followed" in error["message"]
    assert choices(complete(server, regex="[0-9]{2}"))[0][1] == "stop"
