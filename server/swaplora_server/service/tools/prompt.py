"""A conversation with tools for a chat template that knows of none: all of it as text, as Hermes has it."""

from collections.abc import Mapping, Sequence
from typing import Any

from swaplora_server.service.grammar.source import json_text
from swaplora_server.service.tools.call_format import CallFormat

_TOLD = """You may call these functions, each described by a line of JSON:
<tools>
{tools}
</tools>
To call one, write its name and arguments as JSON:
{call}"""
Message = Mapping[str, Any]


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], form: CallFormat) -> list[Message]:
    """The same conversation in messages of system, user and assistant alone, its calls written in `form`."""
    plain = [_plain(message, form) for message in messages]
    if not tools:
        return plain
    told = _TOLD.format(tools="\n".join(json_text(tool) for tool in tools), call=form.example)
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}".strip()}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _plain(message: Message, form: CallFormat) -> Message:
    content = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    calls = form.written([call["function"] for call in message["tool_calls"]])
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": f"{content}\n{calls}" if content else calls}
