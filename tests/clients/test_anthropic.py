"""Anthropic's own client, against us: what it sends is understood, and what it reads is what was said."""

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

import tiny
from serving import BASE, serving, settings

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
SPACES = {str(token_id): -100 for token_id in tiny.byte_tokenizer().encode(" \n\r\t")}
ASKED: dict[str, Any] = {"model": BASE, "max_tokens": 200, "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"name": "weather", "description": "of a city", "input_schema": CITY}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of a base whose context has room for tools, letter by letter."""
    roomy = tiny.save_tiny_base(tmp_path_factory.mktemp("roomy"), {**tiny.LLAMA, "max_position_embeddings": 2048})
    with (
        serving(settings(roomy, tmp_path_factory.mktemp("data"))) as running,
        anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0) as client,
    ):
        yield client


def test_a_conversation_with_a_tool_comes_back_as_it_was_answered(client: Any) -> None:
    asked = ASKED | {"tools": TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    extra = {"seed": 3, "logit_bias": SPACES}
    with client.messages.stream(**asked, extra_body=extra) as stream:
        final = stream.get_final_message()
    told = client.messages.create(**asked, extra_body=extra)
    [use], [again] = final.content, told.content
    assert (use.type, use.name, use.input) == (again.type, again.name, again.input)
    assert use.input in ({"city": "Rome"}, {"city": "Oslo"})
    assert final.stop_reason == told.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    said = [*ASKED["messages"], {"role": "assistant", "content": final.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(**ASKED | {"messages": said, "tools": TOOLS, "max_tokens": 4})
    assert answer.content[0].type == "text"
    counted = client.messages.count_tokens(model=BASE, messages=said, tools=TOOLS)
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_its_output_format_is_kept_to(client: Any) -> None:
    config = {"format": {"type": "json_schema", "schema": CITY}}
    told = client.messages.create(**ASKED, output_config=config, extra_body={"logit_bias": SPACES})
    assert told.content[0].text in ('{"city":"Rome"}', '{"city":"Oslo"}')


def test_its_errors_are_those_of_our_statuses(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError, match="nobody"):
        client.messages.create(**ASKED | {"model": "nobody"})
    with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\].type"):
        client.messages.create(**ASKED, tools=[{"type": "web_search_20250305", "name": "web_search"}])
