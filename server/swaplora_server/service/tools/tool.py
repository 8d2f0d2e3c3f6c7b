"""Functions that a model may call, and the grammar of a text that calls them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import StructTag

from swaplora_server.service.grammar.source import WHITESPACE, GrammarKind, GrammarSource, json_text

BEGIN, END = "<tool_call>", "</tool_call>"
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function. Without parameters it takes none."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    is_strict: bool = False

    @property
    def definition(self) -> dict[str, Any]:
        """As chat templates and OpenAI have it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}

    @property
    def head(self) -> str:
        """What stands before the arguments of a call of it."""
        return f'{BEGIN}\n{{"name": {json.dumps(self.name)}, "arguments": '

    @property
    def schema(self) -> str:
        """Of its arguments, such that keywords that are not known are refused."""
        schema = {**(_NO_PARAMETERS if self.parameters is None else self.parameters)}
        return json_text({**schema, "x-guidance": {"lenient": False, "whitespace_pattern": WHITESPACE}})


_TAIL = f"}}\n{END}"


def calls_only(tools: Sequence[Tool], *, is_one: bool) -> GrammarSource:
    """One call of one of `tools` and nothing else, or several."""
    calls = "call" if is_one else r'call ("\n" call)*'
    rules = "\n".join(
        f"tool_{number}: {json.dumps(tool.head)} %json {tool.schema} {json.dumps(_TAIL)}"
        for number, tool in enumerate(tools)
    )
    any_tool = " | ".join(f"tool_{number}" for number in range(len(tools)))
    return GrammarSource(GrammarKind.LARK, f"start: {calls}\ncall: {any_tool}\n{rules}\n", "tools")


def text_with_calls(tools: Sequence[Tool]) -> GrammarSource:
    """Any text, in which what begins as a call is one; of tools that are not strict with any arguments."""
    tags = [
        StructTag(
            trigger=BEGIN, begin=tool.head, grammar=tool.schema if tool.is_strict else '{"type": "object"}', end=_TAIL
        )
        for tool in tools
    ]
    return GrammarSource(GrammarKind.LARK, StructTag.to_grammar(tags, assume_special=False), "tools")
