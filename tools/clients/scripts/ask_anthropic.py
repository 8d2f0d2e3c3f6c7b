"""anthropic, which asks for messages in Anthropic's shape. It has no argument for the temperature any more."""

import json
from typing import Any

import anthropic

from asked import KEY, MAX_TOKENS, MESSAGES, PARAMETERS, SCHEMA, TOOL_DESCRIPTION, TOOL_NAME, URL, answer

client: Any = anthropic.Anthropic(base_url=URL, api_key=KEY)
FIELDS: dict[str, Any] = {"messages": MESSAGES, "max_tokens": MAX_TOKENS, "extra_body": {"temperature": 0}}
TOOL = {"name": TOOL_NAME, "description": TOOL_DESCRIPTION, "input_schema": PARAMETERS}


def chat(model: str) -> Any:
    return client.messages.create(model=model, **FIELDS).content[0].text


def streaming(model: str) -> Any:
    with client.messages.stream(model=model, **FIELDS) as stream:
        return list(stream.text_stream)


def structured(model: str) -> Any:
    # `messages.parse` of a class leaves out how long a text may be
    asked = {"format": {"type": "json_schema", "schema": SCHEMA}}
    return json.loads(client.messages.create(model=model, output_config=asked, **FIELDS).content[0].text)


def tools(model: str) -> Any:
    choice = {"type": "tool", "name": TOOL_NAME}
    (block,) = client.messages.create(model=model, tools=[TOOL], tool_choice=choice, **FIELDS).content
    return {block.name: block.input}


LACKS = "Anthropic's API has none"
answer(chat=chat, streaming=streaming, structured=structured, tools=tools, logprobs=LACKS, embeddings=LACKS)
