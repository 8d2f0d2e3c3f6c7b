"""Tools: what may be called is told to the model, kept to where it must be, and read out of the text as it grows."""

import json
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageFunctionToolCall

import tiny
from serving import BASE, Running, serving, settings
from swaplora_server.service.chat_template import ChatTemplate
from swaplora_server.service.tools import reader as reader_module
from swaplora_server.service.tools.call_format import HERMES, LLAMA3_JSON, MISTRAL, ObjectCalls
from swaplora_server.service.tools.reader import Argued, Called, CallReader, Part, Said

SPACES = {str(token_id): -100 for token_id in tiny.byte_tokenizer().encode(" \n\r\t")}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TREE = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {}, "additionalProperties": False}}}


def tool(name: str, parameters: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    function = {"name": name, "description": f"does {name}"} | ({"parameters": parameters} if parameters else {})
    return {"type": "function", "function": function | fields}


TOOLS = [tool("weather", WEATHER), tool("tree.of", TREE), tool("now")]
SCHEMAS = {"weather": WEATHER, "tree.of": TREE, "now": {"const": {}}}
USER = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }}:{{ c.function.arguments.city }}){% endfor %}\n"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of a base whose context has room for tools, letter by letter."""
    roomy = tiny.save_tiny_base(tmp_path_factory.mktemp("roomy"), {**tiny.LLAMA, "max_position_embeddings": 2048})
    with serving(settings(roomy, tmp_path_factory.mktemp("data"))) as running:
        yield running


def post(server: Running, **fields: Any) -> Any:
    body = {"model": BASE, "messages": [USER], "seed": 4, "max_tokens": 200, "logit_bias": SPACES, "tools": TOOLS}
    return server.client.post("/v1/chat/completions", json=body | fields)


def chat(server: Running, **fields: Any) -> Any:
    answer = post(server, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def chunks(server: Running, **fields: Any) -> list[dict[str, Any]]:
    text = post(server, stream=True, **fields).text
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event)["choices"][0] for event in events[:-1]]


def read(pieces: list[str], *, is_one: bool = False) -> list[Part]:
    reader = CallReader({"a", "b"}, is_one=is_one)
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.flush()
    joined: list[Part] = []
    for part in parts:
        match joined[-1:], part:
            case [Said(before)], Said(text):
                joined[-1] = Said(before + text)
            case [Argued(number, before)], Argued(_, text):
                joined[-1] = Argued(number, before + text)
            case _, Called(number, call_id, name):
                assert call_id.startswith("call_")
                joined.append(Called(number, "", name))
            case _:
                joined.append(part)
    return joined


def written(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TRICKY = '{"x": "}</tool_call>\\"{", "y": [{"z": {}}]}'
TEXTS: list[tuple[str, list[Part]]] = [
    ("plain", [Said("plain")]),
    ("a < b <tool", [Said("a < b <tool")]),
    (f"first\n{written('a', TRICKY)}", [Said("first\n"), Called(0, "", "a"), Argued(0, TRICKY)]),
    (
        f"{written('a', '{}')}\n{written('b', '{}')}\n ",
        [Called(0, "", "a"), Argued(0, "{}"), Called(1, "", "b"), Argued(1, "{}")],
    ),
    (f"{written('a', '{}')} then", [Called(0, "", "a"), Argued(0, "{}"), Said(" then")]),
    (
        '<tool_call>{"arguments": {"k":1},\n"name":"b"}</tool_call>',
        [Called(0, "", "b"), Argued(0, '{"k":1}')],
    ),
    ('<tool_call>{"arguments": {}, "name":"b"}', [Called(0, "", "b"), Argued(0, "{}")]),
    ('<tool_call>{"name": "a", "arguments": {"k": [1', [Called(0, "", "a"), Argued(0, '{"k": [1')]),
    (written("gone", "{}"), [Said(written("gone", "{}"))]),
    (written("a", "[1]"), [Said(written("a", "[1]"))]),
    ("<tool_call>nonsense</tool_call>!", [Said("<tool_call>nonsense</tool_call>!")]),
    ("<tool_call>cut", [Said("<tool_call>cut")]),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_calls_are_read_out_of_a_text_and_the_rest_stays(text: str, expected: list[Part]) -> None:
    assert read([text]) == expected
    assert read(list(text)) == expected


@given(st.lists(st.sampled_from([*(text for text, _ in TEXTS), "\n", "x<tool_call>"]), max_size=4), st.data())
def test_it_matters_nothing_in_which_pieces_a_text_comes(texts: list[str], data: st.DataObject) -> None:
    whole = "".join(texts)
    cuts = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=8))})
    assert read([whole[start:stop] for start, stop in pairwise(cuts)]) == read([whole])


@pytest.mark.parametrize(
    ("form", "begin", "more"),
    [
        (HERMES, '<tool_call>{"name": "', "x"),
        (HERMES, "<tool_call>", " "),
        (HERMES, '<tool_call>{"arguments": {"k": "', "x"),
        (HERMES, "", "<tool_call>"),
        (HERMES, "", written("a", "{}")),
        (LLAMA3_JSON, '{"', "x"),
        (LLAMA3_JSON, "{", " "),
        (LLAMA3_JSON, '{"name": "', "x"),
        (MISTRAL, '[TOOL_CALLS][{"name": "', "x"),
    ],
)
@pytest.mark.parametrize("is_whole", [False, True])
def test_each_character_is_looked_at_a_few_times_however_long_a_text_is(
    form: ObjectCalls, begin: str, more: str, *, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = 0

    def counting(function: Any) -> Any:
        def count(*arguments: Any) -> Any:
            nonlocal looked_at
            looked_at += sum(len(argument) for argument in arguments if isinstance(argument, str))
            return function(*arguments)

        return count

    head = reader_module._head(form.arguments)  # noqa: SLF001 - what looks at a text
    monkeypatch.setattr(reader_module._ObjectEnd, "find", counting(reader_module._ObjectEnd.find))  # noqa: SLF001
    monkeypatch.setattr(CallReader, "_enter", counting(CallReader._enter))  # noqa: SLF001
    monkeypatch.setattr(reader_module, "_head", lambda _: SimpleNamespace(match=counting(head.match)))

    def work(count: int) -> int:
        nonlocal looked_at
        looked_at = 0
        reader = CallReader({"a"}, form=form)
        for text in [begin + more * count] if is_whole else [begin, *[more] * count]:
            reader.push(text)
        reader.flush()
        return looked_at

    assert work(6000) < 2.5 * work(3000) + 500


def test_with_one_call_wanted_the_others_are_left_out() -> None:
    text = f"{written('a', '{}')}\n{written('b', '{}')}"
    assert read([text], is_one=True) == [Called(0, "", "a"), Argued(0, "{}")]


@pytest.mark.parametrize("seed", range(6))
def test_calls_that_are_required_are_there_and_their_arguments_of_the_schema(server: Running, seed: int) -> None:
    choice = chat(server, tool_choice="required", seed=seed, parallel_tool_calls=seed % 2 == 0)
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    calls = choice["message"]["tool_calls"]
    assert len(calls) == 1 or seed % 2 == 0
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


def test_a_tool_that_is_named_is_the_one_that_is_called(server: Running) -> None:
    for name, schema in SCHEMAS.items():
        choice = chat(server, tool_choice={"type": "function", "function": {"name": name}})
        [call] = choice["message"]["tool_calls"]
        assert (call["function"]["name"], choice["finish_reason"]) == (name, "stop")
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)


def test_a_stream_has_id_and_name_first_then_the_arguments_and_says_the_same(server: Running) -> None:
    fields = {"tool_choice": "required", "parallel_tool_calls": False, "seed": 1, "logprobs": True}
    whole, streamed = chat(server, **fields), chunks(server, **fields)
    assert streamed[0]["delta"] == {"role": "assistant", "content": ""}
    assert streamed[-1]["finish_reason"] == "tool_calls"
    assert streamed[-1]["delta"] == {}
    calls = [chunk["delta"]["tool_calls"][0] for chunk in streamed if "tool_calls" in chunk["delta"]]
    [expected] = whole["message"]["tool_calls"]
    assert calls[0] == {
        "index": 0,
        "id": calls[0]["id"],
        "type": "function",
        "function": {"name": expected["function"]["name"], "arguments": ""},
    }
    assert all(call == {"index": 0, "function": {"arguments": call["function"]["arguments"]}} for call in calls[1:])
    assert "".join(call["function"]["arguments"] for call in calls) == expected["function"]["arguments"]
    assert "".join(chunk["delta"].get("content") or "" for chunk in streamed) == ""
    tokens = [token for chunk in streamed if chunk["logprobs"] for token in chunk["logprobs"]["content"]]
    assert tokens == whole["logprobs"]["content"]


def test_openai_s_own_client_reads_calls(server: Running) -> None:
    asked: Any = {"model": BASE, "messages": [USER], "tools": TOOLS, "tool_choice": "required", "seed": 2}
    asked |= {"logit_bias": SPACES, "max_tokens": 200}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        calls = client.chat.completions.create(**asked).choices[0].message.tool_calls
        with client.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion().choices[0]
    assert calls
    assert final.finish_reason == "tool_calls"
    for call, streamed in zip(calls, final.message.tool_calls or [], strict=True):
        assert isinstance(call, ChatCompletionMessageFunctionToolCall)
        assert (call.function.name, call.function.arguments) == (streamed.function.name, streamed.function.arguments)


def test_a_strict_tool_s_calls_are_valid_wherever_the_model_makes_them(server: Running) -> None:
    begun = {str(token_id): 40 for token_id in tiny.byte_tokenizer().encode("<tool_call>")}
    for seed in range(3):
        choice = chat(server, tools=[tool("weather", WEATHER, strict=True)], seed=seed, logit_bias=SPACES | begun)
        for call in choice["message"].get("tool_calls", []):
            jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER)
        assert '"name"' not in (choice["message"]["content"] or "")


def test_functions_are_answered_as_they_were_before_tools(server: Running) -> None:
    fields: dict[str, Any] = {
        "tools": None,
        "functions": [each["function"] for each in TOOLS],
        "function_call": {"name": "now"},
    }
    choice, streamed = chat(server, **fields), chunks(server, **fields)
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "now", "arguments": "{}"},
    }
    deltas = [chunk["delta"]["function_call"] for chunk in streamed if "function_call" in chunk["delta"]]
    assert deltas[0] == {"name": "now", "arguments": ""}
    assert "".join(delta["arguments"] for delta in deltas) == "{}"


def test_nothing_is_called_where_nothing_may_be(server: Running) -> None:
    plain = chat(server, tools=None)
    assert chat(server, tool_choice="none") | {"logprobs": None} == plain
    assert "tool_calls" not in chat(server)["message"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": "weather"}, "tools"),
    ({"tools": [tool("a b")]}, "tools[0].function.name"),
    ({"tools": [tool("a"), tool("a")]}, "tools"),
    ({"tools": [tool("a", {"type": "strin"})], "tool_choice": "required"}, "tools"),
    ({"tools": [tool("a", {"not": {}}, strict=True)]}, "tools"),
    ({"tools": [tool("a", {"not": {}, "x-guidance": {"lenient": True}}, strict=True)]}, "tools"),
    ({"tool_choice": "always"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "gone"}}}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}]}, "messages[1].tool_calls"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1"}}]}]},
        "messages[1].tool_calls[0].function.arguments",
    ),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:60])
def test_tools_that_cannot_be_called_are_refused_by_name(server: Running, fields: dict[str, Any], param: str) -> None:
    answer = post(server, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == "invalid_request"
    assert error["param"].startswith(param)


CONVERSATION = [
    {"role": "system", "content": "be brief"},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]


def prompt(server: Running, **fields: Any) -> str:
    ids = chat(server, max_tokens=1, return_token_ids=True, **fields)["prompt_token_ids"]
    return str(tiny.byte_tokenizer().decode(ids))


def test_a_template_that_knows_no_tools_is_given_them_as_text(server: Running) -> None:
    text = prompt(server, messages=CONVERSATION)
    for said in ("be brief", "does weather", '"enum":["Rome","Oslo"]', "<user>hi", "<tool_response>\nsunny\n"):
        assert said in text
    assert '<tool_call>\n{"name":"weather","arguments":{"city":"Rome"}}\n</tool_call>' in text
    legacy = [USER, {"role": "assistant", "content": "", "function_call": CALL["function"]}]
    assert '{"name":"weather","arguments":{"city":"Rome"}}' in prompt(server, messages=legacy)
    without = prompt(server, messages=CONVERSATION, tools=None)
    assert "does weather" not in without
    assert "<tool_response>" in without


def test_a_template_that_knows_tools_is_given_them_as_they_are() -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    calls = [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "sunny", "tool_call_id": "c"},
    ]
    text = ChatTemplate(tokenizer).render(messages, {}, TOOLS)
    assert text == "[weather][tree.of][now]<user>hi<assistant>(weather:Rome)<tool>sunny"
