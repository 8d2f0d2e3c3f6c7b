"""Tools and formats in OpenAI's responses and Anthropic's messages: as chats have them, in their own shapes."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from pydantic_core import to_json

import tiny
from serving import BASE, Running, serving, settings
from swaplora_server.service.grammar import source

SPACES = {str(token_id): -100 for token_id in tiny.byte_tokenizer().encode(" \n\r\t")}
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": CITY, "now": NOTHING}
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
ROUTES = pytest.mark.parametrize("route", [RESPONSES, MESSAGES])
OF_CHAT = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in SCHEMAS.items()]
TOOLS: dict[str, list[dict[str, Any]]] = {
    RESPONSES: [{"type": "function", "name": n, "parameters": s} for n, s in SCHEMAS.items()],
    MESSAGES: [{"name": n, "input_schema": s} for n, s in SCHEMAS.items()],
}
CALLED = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
Event = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of a base whose context has room for tools, letter by letter."""
    roomy = tiny.save_tiny_base(tmp_path_factory.mktemp("roomy"), {**tiny.LLAMA, "max_position_embeddings": 2048})
    with serving(settings(roomy, tmp_path_factory.mktemp("data"))) as running:
        yield running


def body(route: str, **fields: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"input": "hi", "max_output_tokens": 300} if route == RESPONSES else {"max_tokens": 300}
    said |= {} if route == RESPONSES else {"messages": [{"role": "user", "content": "hi"}]}
    return {"model": BASE, "seed": 4, "logit_bias": SPACES, "tools": TOOLS[route], **said, **fields}


def ask(server: Running, route: str, **fields: Any) -> dict[str, Any]:
    answer = server.client.post(route, json=body(route, **fields))
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def streamed(server: Running, route: str, **fields: Any) -> list[Event]:
    text = server.client.post(route, json=body(route, stream=True, **fields)).text
    blocks = [block.split("\n") for block in text.split("\n\n") if block]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def forced(text: str) -> dict[str, Any]:
    """Fields by which the answer is `text`."""
    return {"structured_outputs": {"choice": [text]}, "logit_bias": None}


def blocks_of(route: str, told: dict[str, Any]) -> list[tuple[str, Any]]:
    """Each block: text and what it says, or a call's name and its arguments."""
    if route == MESSAGES:
        return [(b["name"], b["input"]) if b["type"] == "tool_use" else ("", b["text"]) for b in told["content"]]
    return [
        (item["name"], json.loads(item["arguments"]))
        if item["type"] == "function_call"
        else ("", item["content"][0]["text"])
        for item in told["output"]
    ]


def assembled(route: str, events: list[Event]) -> list[tuple[str, Any]]:
    """The same of a stream, from what came piece by piece."""
    places: dict[int, tuple[str, bool, str]] = {}
    for _, data in events:
        match data:
            case {"type": "content_block_start", "index": int(place), "content_block": block}:
                places[place] = (block.get("name", ""), block["type"] == "tool_use", "")
            case {"type": "response.output_item.added", "output_index": int(place), "item": item}:
                places[place] = (item.get("name", ""), item["type"] == "function_call", "")
            case {"index": int(place), "delta": {"text": text} | {"partial_json": text}} | {
                "output_index": int(place),
                "delta": str(text),
            }:
                name, is_call, before = places[place]
                places[place] = (name, is_call, before + text)
    return [(name, json.loads(text) if is_call else text) for name, is_call, text in places.values()]


@ROUTES
def test_text_and_calls_are_blocks_in_their_order_streamed_or_whole(server: Running, route: str) -> None:
    expected = [("", "I look.\n"), ("weather", {"city": "Rome"}), ("now", {})]
    told, events = ask(server, route, **forced(CALLED + NOW)), streamed(server, route, **forced(CALLED + NOW))
    assert blocks_of(route, told) == assembled(route, events) == expected
    if route == MESSAGES:
        assert told["stop_reason"] == events[-2][1]["delta"]["stop_reason"] == "tool_use"
        assert all(block["id"].startswith("toolu_") for block in told["content"][1:])
    else:
        assert blocks_of(route, events[-1][1]["response"]) == expected
        assert {item["status"] for item in told["output"]} == {told["status"]} == {"completed"}
        assert len({item["id"] for item in told["output"]}) == 3


CALL_EVENTS = {
    RESPONSES: [
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ],
    MESSAGES: [
        *("message_start", "content_block_start", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ],
}


@ROUTES
def test_a_call_comes_by_its_own_events(server: Running, route: str) -> None:
    events = streamed(server, route, **forced(NOW))
    names = list(dict.fromkeys(name.removeprefix("response.") for name, _ in events))
    assert names[-len(CALL_EVENTS[route]) :] == CALL_EVENTS[route]
    if route == RESPONSES:
        assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
        assert events[2][1]["item"] | {"id": "", "call_id": ""} == {
            **{"id": "", "call_id": "", "type": "function_call", "name": "now"},
            **{"arguments": "", "status": "in_progress"},
        }


NAMED = {RESPONSES: {"type": "function", "name": "weather"}, MESSAGES: {"type": "tool", "name": "weather"}}


@ROUTES
def test_calls_that_are_required_are_there_and_those_that_are_named(server: Running, route: str) -> None:
    one: dict[str, Any] = {"type": "any", "disable_parallel_tool_use": True}
    asked = {"tool_choice": one} if route == MESSAGES else {"tool_choice": "required", "parallel_tool_calls": False}
    [(name, arguments)] = blocks_of(route, ask(server, route, **asked))
    jsonschema.validate(arguments, SCHEMAS[name])
    [(name, _)] = blocks_of(route, ask(server, route, tool_choice=NAMED[route]))
    assert name == "weather"


@ROUTES
def test_only_one_call_is_told_where_one_is_wanted(server: Running, route: str) -> None:
    one: dict[str, Any] = {"parallel_tool_calls": False}
    if route == MESSAGES:
        one = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    assert blocks_of(route, ask(server, route, **one, **forced(NOW + "\n" + NOW))) == [("now", {})]


@ROUTES
def test_nothing_is_called_where_nothing_may_be(server: Running, route: str) -> None:
    none = "none" if route == RESPONSES else {"type": "none"}
    told = ask(server, route, tool_choice=none, **forced(NOW))
    assert blocks_of(route, told) == [("", NOW)]


@ROUTES
def test_a_call_that_is_cut_off_is_told_as_far_as_it_came(server: Running, route: str) -> None:
    limit = {"max_output_tokens" if route == RESPONSES else "max_tokens": len(CALLED) - 20}
    told, events = ask(server, route, **forced(CALLED), **limit), streamed(server, route, **forced(CALLED), **limit)
    if route == MESSAGES:
        assert told["content"][-1]["input"] in ({"city": "Rom"}, {}, {"city": "R"}, {"city": "Ro"}, {"city": "Rome"})
        assert told["stop_reason"] == "max_tokens"
    else:
        assert [item["status"] for item in told["output"]] == ["completed", "incomplete"]
        assert (told["status"], events[-1][0]) == ("incomplete", "response.incomplete")
        assert events[-2][1]["item"]["status"] == "incomplete"


def test_arguments_that_are_no_json_are_told_as_they_are(server: Running) -> None:
    odd = '<tool_call>{"name": "now", "arguments": {odd}}</tool_call>'
    assert blocks_of(MESSAGES, ask(server, MESSAGES, **forced(odd))) == [("now", {"arguments": "{odd}"})]
    assert ask(server, RESPONSES, **forced(odd))["output"][0]["arguments"] == "{odd}"


CHAT = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"id": f"c{n}", "type": "function", "function": {"name": "weather", "arguments": f'{{"city":"{city}"}}'}}
            for n, city in enumerate(("Rome", "Oslo"))
        ],
    },
    {"role": "tool", "tool_call_id": "c0", "content": "sunny"},
    {"role": "tool", "tool_call_id": "c1", "content": "dark"},
    {"role": "user", "content": "and?"},
]
ITEMS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
    {"type": "function_call", "call_id": "c0", "name": "weather", "arguments": '{"city": "Rome"}'},
    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}', "id": "fc_1"},
    {"type": "function_call_output", "call_id": "c0", "output": "sunny"},
    {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "dark"}]},
    {"role": "user", "content": "and?"},
]
USES = [
    {"type": "tool_use", "id": f"c{n}", "name": "weather", "input": {"city": c}} for n, c in enumerate(("Rome", "Oslo"))
]
RESULTS: list[dict[str, Any]] = [
    {"type": "tool_result", "tool_use_id": "c0", "content": "sunny"},
    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "dark"}]},
]
BLOCKS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": [{"type": "text", "text": "I look."}, *USES]},
    {"role": "user", "content": [*RESULTS, {"type": "text", "text": "and?"}]},
]


def test_calls_and_results_are_the_conversation_that_a_chat_has(server: Running) -> None:
    asked = {"model": BASE, "messages": CHAT, "tools": OF_CHAT, "temperature": 0, "max_tokens": 9}
    chat = server.client.post("/v1/chat/completions", json=asked).json()
    text = chat["choices"][0]["message"]["content"]
    greedy = {"temperature": 0, "logit_bias": None}
    response = ask(server, RESPONSES, input=ITEMS, max_output_tokens=9, **greedy)
    message = ask(server, MESSAGES, messages=BLOCKS, max_tokens=9, **greedy)
    assert (response["output"][0]["content"][0]["text"], message["content"][0]["text"]) == (text, text)
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    counted = {"model": BASE, "messages": BLOCKS, "tools": TOOLS[MESSAGES]}
    tokens = server.client.post("/v1/messages/count_tokens", json=counted).json()
    assert tokens == {"input_tokens": chat["usage"]["prompt_tokens"]}


def test_a_result_that_is_an_error_says_so(server: Running) -> None:
    def counted(result: dict[str, Any]) -> int:
        messages = [BLOCKS[0], {"role": "assistant", "content": USES[:1]}, {"role": "user", "content": [result]}]
        told = server.client.post("/v1/messages/count_tokens", json={"model": BASE, "messages": messages}).json()
        return int(told["input_tokens"])

    assert counted(RESULTS[0] | {"is_error": True}) == counted(RESULTS[0]) + len("Error: ")


def test_openai_s_own_client_reads_a_response_s_calls(server: Running) -> None:
    asked: Any = {"model": BASE, "input": "hi", "tools": TOOLS[RESPONSES], "tool_choice": "required"}
    asked["parallel_tool_calls"] = False
    asked["extra_body"] = {"seed": 1, "logit_bias": SPACES}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        told = client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            final: Any = list(stream)[-1]
    assert [item.type for item in told.output] == [item.type for item in final.response.output]
    assert {item.type for item in told.output} == {"function_call"}
    for item, streamed_item in zip(told.output, final.response.output, strict=True):
        assert (item.name, item.arguments) == (streamed_item.name, streamed_item.arguments)


def test_a_text_s_format_is_kept_to_and_told(server: Running) -> None:
    named = {"type": "json_schema", "name": "place", "schema": CITY, "strict": True}
    asked: list[tuple[dict[str, Any], str]] = [
        ({"text": {"format": named}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY}}}, "json_schema"),
        ({"text": {"format": {"type": "json_object"}}, "logit_bias": {"125": 3}}, "json_object"),
        ({"text": {"format": {"type": "text"}}}, "text"),
        ({"guided_regex": "[ab]{3}"}, "text"),
    ]
    for fields, kind in asked:
        told = ask(server, RESPONSES, tools=None, **fields)
        form, text = told["text"]["format"], told["output"][0]["content"][0]["text"]
        assert form["type"] == kind
        if kind == "json_schema":
            assert (form["name"], form["schema"]) == ("place", CITY)
            jsonschema.validate(json.loads(text), CITY)
    assert form == {"type": "text", "regex": "[ab]{3}"}
    started = streamed(server, RESPONSES, tools=None, text={"format": named})
    assert started[0][1]["response"]["text"]["format"]["schema"] == CITY
    of_messages: tuple[dict[str, Any], ...] = (
        {"output_config": {"format": {"type": "json_schema", "schema": CITY}}},
        {"output_format": {"type": "json_schema", "schema": CITY}},
    )
    for fields in of_messages:
        [(_, text)] = blocks_of(MESSAGES, ask(server, MESSAGES, tools=None, **fields))
        jsonschema.validate(json.loads(text), CITY)


def test_a_large_schema_is_written_where_its_body_is_read_and_not_on_the_event_loop(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"type": "object", "description": "x" * 40_000}
    form = {"type": "json_schema", "schema": large}
    asked: list[tuple[str, dict[str, Any]]] = [
        (RESPONSES, {"tools": [{"type": "function", "name": "f", "parameters": large, "strict": True}]}),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": large, "strict": True}]}),
        (RESPONSES, {"tools": None, "text": {"format": form | {"name": "x"}}}),
        (MESSAGES, {"tools": None, "output_config": {"format": form}}),
    ]
    are_on_loop: list[bool] = []

    def noting(value: Any) -> bytes:
        are_on_loop.append(asyncio._get_running_loop() is not None)  # noqa: SLF001 - the other way raises
        return to_json(value)

    monkeypatch.setattr(source, "to_json", noting)
    for route, fields in asked:
        server.client.post(route, json=body(route, max_tokens=1, **fields))
        assert are_on_loop == [False], fields
        are_on_loop.clear()


CALL = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
USE = {"type": "tool_use", "id": "c", "name": "now", "input": {}}
SAID = {"role": "user", "content": "hi"}
BAD: list[tuple[str, dict[str, Any], str]] = [
    (RESPONSES, {"tools": [{"type": "function"}]}, "tools[0].name"),
    (RESPONSES, {"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools[0].name"),
    (RESPONSES, {"tools": [*TOOLS[RESPONSES], TOOLS[RESPONSES][0]]}, "tools"),
    (RESPONSES, {"tool_choice": "any"}, "tool_choice"),
    (RESPONSES, {"tool_choice": {"type": "function", "name": "gone"}}, "tool_choice"),
    (RESPONSES, {"tools": [], "tool_choice": "required"}, "tool_choice"),
    (RESPONSES, {"input": [CALL]}, "input[0].call_id"),
    (RESPONSES, {"input": [CALL, CALL]}, "input[1].call_id"),
    (RESPONSES, {"input": [CALL | {"arguments": "[1"}]}, "input[0].arguments"),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
    (RESPONSES, {"input": [CALL, {"type": "function_call_output", "call_id": "c"}]}, "input[1].output"),
    (RESPONSES, {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    (RESPONSES, {"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
    (RESPONSES, {"text": {"format": {"type": "xml"}}}, "text.format.type"),
    (RESPONSES, {"text": {"format": {"type": "json_object"}}, "regex": "a"}, "text.format.schema"),
    (RESPONSES, {"text": {"format": {"type": "json_object"}}, "tool_choice": "required"}, "text.format.schema"),
    (RESPONSES, {"guided_json": "{"}, "guided_json"),
    (RESPONSES, {"json_schema": "[]", "stream": True}, "json_schema"),
    (MESSAGES, {"tools": [{"name": "x"}]}, "tools[0].input_schema"),
    (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    (MESSAGES, {"tools": [*TOOLS[MESSAGES], TOOLS[MESSAGES][0]]}, "tools"),
    (MESSAGES, {"tool_choice": "auto"}, "tool_choice"),
    (MESSAGES, {"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    (MESSAGES, {"tool_choice": {"type": "any", "name": "now"}}, "tool_choice.name"),
    (MESSAGES, {"tool_choice": {"type": "tool", "name": "gone"}}, "tool_choice"),
    (MESSAGES, {"tools": None, "tool_choice": {"type": "any"}}, "tool_choice"),
    (MESSAGES, {"messages": [SAID, {"role": "assistant", "content": [USE]}]}, "messages[1].content[0].id"),
    (MESSAGES, {"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0].type"),
    (MESSAGES, {"messages": [{"role": "user", "content": RESULTS[:1]}]}, "messages[0].content[0].tool_use_id"),
    (MESSAGES, {"messages": [{"role": "assistant", "content": RESULTS[:1]}]}, "messages[0].content[0].type"),
    (MESSAGES, {"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
    (MESSAGES, {"output_format": {"type": "json_schema"}}, "output_format.schema"),
    (MESSAGES, {"output_config": {"effort": "max"}}, "output_config.effort"),
]


@pytest.mark.parametrize(("route", "fields", "named"), BAD, ids=lambda value: str(value)[:50])
def test_what_has_no_place_is_refused_by_name(server: Running, route: str, fields: dict[str, Any], named: str) -> None:
    answer = server.client.post(route, json=body(route, **fields))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"].startswith(named) if route == MESSAGES else error["param"] == named, error
