"""What each API's answers and streams look like, whole: shapes and order as in the files of `golden`.

`WRITE_GOLDEN=1 pytest tests/clients/test_golden.py` writes them anew. Ids and times stand as `ID` and `0`; of events
that follow each other and differ in the piece of text alone there is one. OpenAI's and Anthropic's own types, taken
strictly, check each object.
"""

import json
import os
import re
import uuid
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types import Completion, ErrorObject
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter, ValidationError

import tiny
from serving import BASE, Running, serving, settings
from swaplora_server.engine.request import FinishReason, Request, TokenEvent

GOLDEN = Path(__file__).parent / "golden"
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
CALLED = 'Wait.<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'
NOTHING: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
FUNCTION = {"name": "now", "description": "the time", "parameters": NOTHING}
TOOLS: dict[str, Any] = {
    CHAT: {"tools": [{"type": "function", "function": FUNCTION}]},
    RESPONSES: {"tools": [{"type": "function", **FUNCTION}]},
    MESSAGES: {"tools": [{"name": "now", "description": "the time", "input_schema": NOTHING}]},
}
USAGE = {"stream_options": {"include_usage": True}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": (COMPLETIONS, {"structured_outputs": {"choice": ["Rome."]}}),
    "completions_logprobs": (COMPLETIONS, {"structured_outputs": {"choice": ["Ro"]}, "logprobs": 1, "echo": True}),
    "chat": (CHAT, {"structured_outputs": {"choice": ["Rome."]}}),
    "chat_logprobs": (CHAT, {"structured_outputs": {"choice": ["Ro"]}, "logprobs": True, "top_logprobs": 1}),
    "chat_tools": (CHAT, {"structured_outputs": {"choice": [CALLED]}, **TOOLS[CHAT]}),
    "chat_functions": (CHAT, {"structured_outputs": {"choice": [CALLED]}, "functions": [FUNCTION]}),
    "chat_reasoning": (CHAT, {"chat_template_kwargs": {"opened": True}}),
    "responses": (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"const": "Rome."}}}}),
    "responses_tools": (RESPONSES, {"structured_outputs": {"choice": [CALLED]}, **TOOLS[RESPONSES]}),
    "responses_reasoning": (RESPONSES, {"instructions": "opened"}),
    "messages": (MESSAGES, {"structured_outputs": {"choice": ["Rome."]}}),
    "messages_tools": (MESSAGES, {"structured_outputs": {"choice": [CALLED]}, **TOOLS[MESSAGES]}),
    "messages_reasoning": (MESSAGES, {"system": "opened", "thinking": {"type": "enabled", "budget_tokens": 1024}}),
}
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "hi", "max_tokens": 100},
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100},
    RESPONSES: {"input": "hi", "max_output_tokens": 100},
    MESSAGES: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100},
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if opened or messages[0].content == 'opened' %}<think>{% else %}{# </think> #}{% endif %}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of a base whose template opens its reasoning, where it is to."""
    base = tiny.save_tiny_base(tmp_path_factory.mktemp("golden"), {**tiny.LLAMA, "max_position_embeddings": 1024})
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    with serving(settings(base, tmp_path_factory.mktemp("data"))) as running:
        yield running


def body(name: str) -> tuple[str, dict[str, Any]]:
    route, fields = CASES[name]
    asked = {"model": BASE, "temperature": 0, "cache_salt": uuid.uuid4().hex, **BODIES[route], **fields}
    if name.endswith("reasoning"):  # nothing but x, which the end of the reasoning is not: it is cut off
        asked |= {"allowed_token_ids": tiny.byte_tokenizer().encode("x")}
        asked |= {"max_output_tokens" if route == RESPONSES else "max_tokens": 3}
    return route, asked


def frames(text: str) -> list[tuple[str, str]]:
    """The name of each event, where it has one, and its data."""
    found = []
    for frame in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in frame.split("\n") if not line.startswith(":"))
        found.append((lines.pop("event", ""), lines.pop("data")))
        assert not lines
    return found


def plain(value: Any) -> Any:
    """Without what differs from one run to the next."""
    match value:
        case dict():
            return {name: _plain_field(name, field) for name, field in value.items()}
        case list():
            return [plain(each) for each in value]
        case float():
            return 0.5
        case str():
            return re.sub(r"\b(chatcmpl-|cmpl-|fp_|resp_|msg_|rs_|fc_|call_|toolu_)[0-9a-f]{8,}", r"\1ID", value)
    return value


def _plain_field(name: str, value: Any) -> Any:
    if name in ("created", "created_at"):
        return 0
    if name in ("top_logprobs", "text_offset", "token_logprobs", "tokens") and value:
        return ["..."]
    return plain(value)


PIECES = {"content", "text", "delta", "arguments", "partial_json", "thinking", "token"}
PIECES |= {"reasoning", "reasoning_content"}


def shape(event: tuple[str, Any]) -> str:
    """What is the same in two events that differ in their pieces of text alone."""
    name, data = event
    return name + json.dumps(_without_pieces(data, {"sequence_number": 0} if name else {}))


def _without_pieces(value: Any, known: dict[str, Any]) -> Any:
    match value:
        case dict():
            is_piece = {name: name in PIECES and isinstance(each, str) for name, each in value.items()}
            return {name: "" if is_piece[name] else _without_pieces(each, {}) for name, each in value.items()} | known
        case list():
            return [_without_pieces(each, {}) for each in value]
    return value


BYTES = re.compile(r'"bytes": \[[\d, ]*\]')


def told(whole: Any, events: list[tuple[str, str]]) -> str:
    read = [(name, data if data == "[DONE]" else plain(json.loads(data))) for name, data in events]
    lines = [json.dumps(plain(whole), indent=1, ensure_ascii=False), ""]
    for _, alike in groupby(read, shape):
        name, data = next(alike)
        if isinstance(data, dict) and "sequence_number" in data:
            data["sequence_number"] = 0
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        lines += [*([f"event: {name}"] if name else []), f"data: {text}", ""]
    return BYTES.sub('"bytes": [0]', "\n".join(lines))


def check(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; see how to write it anew above"


TYPES: dict[str, tuple[Any, Any]] = {
    COMPLETIONS: (Completion, Completion),
    CHAT: (ChatCompletion, ChatCompletionChunk),
    RESPONSES: (Response, ResponseStreamEvent),
    MESSAGES: (Message, RawMessageStreamEvent),
}


def types_of(route: str) -> tuple[TypeAdapter[Any], TypeAdapter[Any]]:
    """Of what is whole, and of an event."""
    whole, event = TYPES[route]
    return TypeAdapter(whole), TypeAdapter(event)


# where OpenAI's API sends null, and its types do not say so
NULLS = {"finish_reason", "token_logprobs", "top_logprobs"}


def wrong_in(kind: TypeAdapter[Any], data: str) -> list[Any]:
    """What is not of that type."""
    try:
        kind.validate_json(data, strict=True)
    except ValidationError as error:
        return [each for each in error.errors() if each["input"] is not None or not NULLS & set(each["loc"])]
    return []


@pytest.mark.parametrize("name", CASES)
def test_answers_and_streams_are_what_they_were(server: Running, name: str) -> None:
    route, asked = body(name)
    whole = server.client.post(route, json=asked)
    assert whole.status_code == 200, whole.text
    usage = USAGE if route in (CHAT, COMPLETIONS) else {}
    events = frames(
        server.client.post(route, json=asked | {"stream": True, "cache_salt": uuid.uuid4().hex} | usage).text
    )
    check(name, told(whole.json(), events))
    of_whole, of_event = types_of(route)
    assert wrong_in(of_whole, whole.text) == []
    assert [wrong for _, data in events if data != "[DONE]" for wrong in wrong_in(of_event, data)] == []


def test_errors_are_what_they_were(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first byte, and behind it, where the engine ends the request after two tokens."""
    tell, text = Request.tell, ""
    for route, asked in BODIES.items():
        refused = server.client.post(route, json=asked | {"model": "nobody"})
        text += f"{route} {refused.status_code}\n{json.dumps(refused.json())}\n"
        if route != MESSAGES:
            ErrorObject.model_validate(refused.json()["error"], strict=True)
        heard: list[TokenEvent] = []

        def failing(self: Request, event: TokenEvent, heard: list[TokenEvent] = heard) -> None:
            heard.append(event)
            if len(heard) < 3:
                tell(self, event)
            elif len(heard) == 3:
                tell(self, TokenEvent(event.index, finish_reason=FinishReason.ERROR, error="it broke"))

        with monkeypatch.context() as patch:
            patch.setattr(Request, "tell", failing)
            answer = server.client.post(route, json={"model": BASE, "stream": True, "temperature": 0, **asked})
        for name, data in frames(answer.text):
            if name == "error" or '"error"' in data[:10] or data == "[DONE]":
                text += re.sub(r'"sequence_number":\d+', '"sequence_number":0', f"{name}: {data}\n")
        server.wait_idle()
    check("errors", text)
