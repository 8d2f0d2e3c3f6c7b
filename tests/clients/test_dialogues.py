"""OpenAI's responses and Anthropic's messages: one answer of the same generation, in their own objects and events."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseUsage

import tiny
from serving import BASE, Running, serving, settings
from swaplora_server.engine.request import FinishReason, Request, TokenEvent

TURNS = [{"role": "user", "content": "hi"}]
FIELDS: dict[str, Any] = {"model": BASE, "temperature": 0, "ignore_eos": True}
RESPONSE_ORDER = ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"]
RESPONSE_ENDING = ["output_text.done", "content_part.done", "output_item.done"]


def said_in_a_chat(server: Running, messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    answer = server.client.post("/v1/chat/completions", json=FIELDS | {"messages": messages} | fields)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def post(server: Running, route: str, **fields: Any) -> dict[str, Any]:
    answer = server.client.post(route, json=FIELDS | fields)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def streamed(server: Running, route: str, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    """Names and objects of the events, in order."""
    with server.client.stream("POST", route, json=FIELDS | {"stream": True} | fields) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(answer.iter_text()).split("\n\n")
    lines = [block.split("\n") for block in blocks if block and not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_response_is_what_a_chat_says(server: Running) -> None:
    system = {"role": "system", "content": "be brief"}
    expected = said_in_a_chat(server, [system, *TURNS], max_tokens=6)
    told = post(server, "/v1/responses", input="hi", instructions="be brief", max_output_tokens=6)
    parts = [{"type": "input_text", "text": "h"}, {"type": "input_text", "text": "i"}]
    items = [{"role": "developer", "content": "be brief"}, {"type": "message", "role": "user", "content": parts}]
    of_items = post(server, "/v1/responses", input=items, max_output_tokens=6)
    for response in (told, of_items):
        (part,) = response["output"][0]["content"]
        assert part["text"] == expected["choices"][0]["message"]["content"]
        assert response["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
        assert response["usage"]["output_tokens"] == 6
        assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert (response["store"], response["previous_response_id"]) == (False, None)


def test_a_response_is_of_openais_own_types(client: openai.OpenAI, server: Running) -> None:
    told = client.responses.create(model=BASE, input="hi", max_output_tokens=3, temperature=0)
    assert told.output_text
    assert isinstance(told.usage, ResponseUsage)
    Response.model_validate(told.model_dump(), strict=False)
    with client.responses.create(model=BASE, input="hi", max_output_tokens=3, temperature=0, stream=True) as events:
        *begun, last = list(events)
    assert [event.type for event in begun[:2]] == ["response.created", "response.in_progress"]
    assert last.type == "response.incomplete"
    assert last.response.output_text == told.output_text


def test_a_stream_of_a_response_has_its_events_in_openais_order(server: Running) -> None:
    events = streamed(server, "/v1/responses", input="hi", max_output_tokens=5)
    names = [name for name, _ in events]
    assert list(dict.fromkeys(names)) == [
        f"response.{name}" for name in [*RESPONSE_ORDER, *RESPONSE_ENDING, "incomplete"]
    ]
    assert [data["type"] for _, data in events] == names
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    whole = post(server, "/v1/responses", input="hi", max_output_tokens=5)
    text = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
    assert (
        text == whole["output"][0]["content"][0]["text"] == events[-1][1]["response"]["output"][0]["content"][0]["text"]
    )
    ended = streamed(server, "/v1/responses", input="hi", logit_bias={str(tiny.EOS): 100}, ignore_eos=False)
    assert ended[-1][0] == "response.completed"
    assert ended[-1][1]["response"]["status"] == "completed"


def test_a_message_is_what_a_chat_says(server: Running) -> None:
    system = {"role": "system", "content": "be brief"}
    expected = said_in_a_chat(server, [system, *TURNS], max_tokens=6)
    blocks = [{"type": "text", "text": "h"}, {"type": "text", "text": "i", "cache_control": None}]
    for messages in (TURNS, [{"role": "user", "content": blocks}]):
        told = post(server, "/v1/messages", system="be brief", messages=messages, max_tokens=6)
        assert told["content"] == [{"type": "text", "text": expected["choices"][0]["message"]["content"]}]
        assert (told["type"], told["role"], told["stop_reason"]) == ("message", "assistant", "max_tokens")
        usage = told["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected["usage"]["prompt_tokens"]
        assert usage["output_tokens"] == 6
    counted = post(server, "/v1/messages/count_tokens", system="be brief", messages=TURNS)
    assert counted == {"input_tokens": expected["usage"]["prompt_tokens"]}


def test_a_message_goes_on_with_what_the_assistant_has_begun(server: Running) -> None:
    begun = [*TURNS, {"role": "assistant", "content": "Well"}]
    expected = said_in_a_chat(server, begun, max_tokens=4, continue_final_message=True, add_generation_prompt=False)
    told = post(server, "/v1/messages", messages=begun, max_tokens=4)
    assert told["content"][0]["text"] == expected["choices"][0]["message"]["content"]


def test_a_message_says_what_it_ended_by(server: Running) -> None:
    text = post(server, "/v1/messages", messages=TURNS, max_tokens=30)["content"][0]["text"]
    stop = next(character for character in text[3:] if character.isprintable() and character != "\ufffd")
    told = post(server, "/v1/messages", messages=TURNS, max_tokens=30, stop_sequences=["never said", stop])
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", stop)
    assert told["content"][0]["text"] == text[: text.index(stop)]
    ended = post(
        server, "/v1/messages", messages=TURNS, max_tokens=9, logit_bias={str(tiny.EOS): 100}, ignore_eos=False
    )
    assert (ended["stop_reason"], ended["stop_sequence"]) == ("end_turn", None)


def test_a_stream_of_a_message_has_its_events_in_anthropics_order(server: Running) -> None:
    events = streamed(server, "/v1/messages", messages=TURNS, max_tokens=5)
    names = [name for name, _ in events]
    start = ["message_start", "content_block_start", "content_block_delta"]
    assert list(dict.fromkeys(names)) == [*start, "content_block_stop", "message_delta", "message_stop"]
    assert [data["type"] for _, data in events] == names
    first, last = events[0][1]["message"], events[-2][1]
    assert (first["content"], first["stop_reason"], first["usage"]["output_tokens"]) == ([], None, 0)
    assert (last["delta"]["stop_reason"], last["usage"]) == ("max_tokens", {"output_tokens": 5})
    text = "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta")
    assert text == post(server, "/v1/messages", messages=TURNS, max_tokens=5)["content"][0]["text"]


def test_an_adapter_answers_by_its_name_and_is_told(server: Running, adapters: list[Path]) -> None:
    server.put("tuned", adapters[5])
    for route, fields in (
        ("/v1/responses", {"input": "hi", "max_output_tokens": 2}),
        ("/v1/messages", {"messages": TURNS, "max_tokens": 2}),
    ):
        answer = server.client.post(route, json=FIELDS | {"model": "tuned"} | fields)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["model"], answer.headers["x-swaplora-adapter"]) == ("tuned", "tuned@1")


RESPONSE, MESSAGE = {"input": "hi"}, {"messages": TURNS, "max_tokens": 2}


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("/v1/responses", {}, "input"),
        ("/v1/responses", {"input": []}, "input"),
        ("/v1/responses", {"input": 5}, "input"),
        ("/v1/responses", {"input": [{"type": "computer_call_output", "call_id": "x"}]}, "input[0].type"),
        ("/v1/responses", {"input": [{"type": 5}]}, "input[0].type"),
        ("/v1/responses", {"input": ["hi"]}, "input[0]"),
        ("/v1/responses", {"input": [{"role": "user"}]}, "input[0].content"),
        ("/v1/responses", {"input": [{"content": "x"}]}, "input[0].role"),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ("/v1/responses", RESPONSE | {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/responses", RESPONSE | {"background": True}, "background"),
        ("/v1/responses", RESPONSE | {"conversation": "c"}, "conversation"),
        ("/v1/responses", RESPONSE | {"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ("/v1/responses", RESPONSE | {"text": {"verbosity": "high"}}, "text.verbosity"),
        ("/v1/responses", RESPONSE | {"max_output_tokens": 0}, "max_output_tokens"),
        ("/v1/responses", RESPONSE | {"max_output_tokens": 10**6}, "max_output_tokens"),
        ("/v1/responses", RESPONSE | {"n": 2}, "n"),
    ],
)
def test_what_a_response_cannot_be_is_refused_by_its_field(
    server: Running, route: str, fields: dict[str, Any], param: str
) -> None:
    answer = server.client.post(route, json={"model": BASE} | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "status", "kind", "told"),
    [
        ({"messages": TURNS}, 400, "invalid_request_error", "max_tokens"),
        (MESSAGE | {"messages": []}, 400, "invalid_request_error", "messages"),
        (
            MESSAGE | {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "invalid_request_error",
            "image",
        ),
        (MESSAGE | {"model": "nobody"}, 404, "not_found_error", "nobody"),
        (MESSAGE | {"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences"),
        (MESSAGE | {"stop_sequences": ["x" * 9000]}, 400, "invalid_request_error", "stop_sequences"),
        (MESSAGE | {"tools": [{"name": "x"}]}, 400, "invalid_request_error", "tools"),
        (MESSAGE | {"thinking": {"type": "much"}}, 400, "invalid_request_error", "thinking"),
        (MESSAGE | {"max_tokens": 10**6}, 400, "invalid_request_error", "maximum context length"),
        (MESSAGE | {"stream": True, "n": 3}, 400, "invalid_request_error", "n is not supported"),
    ],
)
def test_a_message_that_cannot_be_is_refused_in_anthropics_shape(
    server: Running, fields: dict[str, Any], status: int, kind: str, told: str
) -> None:
    answer = server.client.post("/v1/messages", json={"model": BASE} | fields)
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert told in body["error"]["message"]


def test_anthropics_key_opens_the_door_and_a_wrong_one_is_told_in_its_shape(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, api_key=["secret"])) as locked:
        body = {"model": BASE, **MESSAGE}
        version = {"anthropic-version": "2023-06-01"}
        for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            assert locked.client.post("/v1/messages", json=body, headers=headers | version).status_code == 200
        for wrong in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong", "x-api-key": "secret"}):
            refused = locked.client.post("/v1/messages", json=body, headers=wrong | version)
            assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")


def test_a_failure_behind_the_first_byte_is_an_event(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ends the request with an error after three tokens."""
    tell = Request.tell

    def failing(self: Request, event: TokenEvent) -> None:
        if len(told) < 3:
            told.append(event)
            tell(self, event)
        elif len(told) == 3:
            told.append(event)
            tell(self, TokenEvent(event.index, finish_reason=FinishReason.ERROR, error="it broke"))

    for route, fields, name in (("/v1/responses", RESPONSE, "error"), ("/v1/messages", MESSAGE, "error")):
        told: list[TokenEvent] = []
        with monkeypatch.context() as patch:
            patch.setattr(Request, "tell", failing)
            length = "max_output_tokens" if fields is RESPONSE else "max_tokens"
            events = streamed(server, route, **(fields | {length: 9}))
        assert events[-1][0] == name
        assert "it broke" in json.dumps(events[-1][1])
        server.wait_idle()


def test_a_client_that_goes_ends_its_answer(server: Running) -> None:
    with (
        httpx.Client(base_url=server.url) as client,
        client.stream("POST", "/v1/messages", json=FIELDS | MESSAGE | {"max_tokens": 400, "stream": True}) as answer,
    ):
        next(answer.iter_lines())
    server.wait_idle()


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


def test_an_answer_keeps_to_a_format(server: Running) -> None:
    format = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    response = post(server, "/v1/responses", input="hi", max_output_tokens=400, response_format=format)
    message = post(server, "/v1/messages", messages=TURNS, max_tokens=400, response_format=format)
    for text in (response["output"][0]["content"][0]["text"], message["content"][0]["text"]):
        assert json.loads(text) in ({"a": 1}, {"a": 2})


@pytest.mark.parametrize(
    ("route", "field", "value"),
    [
        ("/v1/responses", "max_tokens", 5),
        ("/v1/responses", "max_completion_tokens", 5),
        ("/v1/responses", "messages", TURNS),
        ("/v1/responses", "logprobs", True),
        ("/v1/responses", "best_of", 2),
        ("/v1/messages", "max_completion_tokens", 5),
        ("/v1/messages", "top_logprobs", 2),
        ("/v1/messages", "echo", True),
        ("/v1/messages", "lora_name", "tuned"),
        ("/v1/completions", "max_completion_tokens", 5),
        ("/v1/completions", "top_logprobs", 2),
        ("/v1/completions", "merged_adapters", {"ids": ["a"], "weights": [1.0]}),
        ("/v1/chat/completions", "lora_name", "tuned"),
        ("/v1/chat/completions", "merged_adapters", {"ids": ["a"], "weights": [1.0]}),
    ],
)
def test_what_another_api_calls_so_is_refused_by_name(server: Running, route: str, field: str, value: object) -> None:
    asked: dict[str, dict[str, Any]] = {
        "/v1/responses": {"input": "hi"},
        "/v1/messages": {"messages": TURNS, "max_tokens": 4},
        "/v1/completions": {"prompt": "hi"},
        "/v1/chat/completions": {"messages": TURNS},
    }
    answer = server.client.post(route, json={"model": BASE, **asked[route], field: value})
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"]
