"""How a base writes calls in its text, and the grammar of a text that does."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from swaplora_server.service.grammar.source import GrammarKind, GrammarSource, json_text
from swaplora_server.service.tools.tool import Tool


@dataclass(frozen=True)
class CallFormat:
    """One way to write calls: objects with a name and arguments, behind a mark."""

    name: str
    mark: str  # what calls begin with
    opening: str  # behind the mark, before the first
    separator: str  # between two; "" where each has a mark of its own
    closing: str  # behind the last
    arguments: str  # what an object calls them
    before: str  # all of these once more, as a text that is held to calls has them
    between: str
    after: str
    is_bare: bool = False  # whether a text that begins with a call needs no mark
    special: Mapping[str, int] = field(default_factory=dict)  # the parts of it that are tokens which text cannot say

    def of_tokens(self, special: Mapping[int, str]) -> "CallFormat":
        """The same, for a base with these special tokens."""
        own = {name: token_id for token_id, name in special.items() if name and name in self.mark + self.closing}
        return replace(self, special=own)

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls with names and arguments, as a text has them."""
        objects = [json_text({"name": call["name"], self.arguments: call["arguments"]}) for call in calls]
        return self.before + self.between.join(objects) + self.after

    def calls_only(self, tools: Sequence[Tool], *, is_one: bool) -> GrammarSource:
        """One call of one of `tools` and nothing else, or several."""
        calls = self._calls("any_tool" if is_one else self._list("any_tool"))
        return self._grammar(f"start: {calls}\n{self._any_tool(tools, lenient=())}")

    def text_with_calls(self, tools: Sequence[Tool]) -> GrammarSource:
        """Any text, in which what begins as a call is one; of tools that are not strict with any arguments."""
        lenient = [tool.name for tool in tools if not tool.is_strict]
        any_tool = self._any_tool(tools, lenient)
        calls = self._calls(self._list("any_tool") if self.separator else "any_tool")
        behind = calls.removeprefix(self._literal(self.mark)) if not self.is_bare else calls
        mark = self._literal(self.mark)
        marked = f"TEXT {mark}" if self.mark in self.special else "marked"
        rules = "" if self.mark in self.special else f"marked[lazy]: TEXT {mark}\n"
        if self.is_bare:
            without = f" & ~/(?s:.*){re.escape(self.mark).replace('/', chr(92) + '/')}(?s:.*)/"
            plain = r"PLAIN: /(\s*[^\s{](.|\n)*)?/" + ("" if self.mark in self.special else without)
            start = f"start: {calls} | PLAIN | {marked.replace('TEXT', 'PLAIN')} {calls}\n{plain}\n"
            return self._grammar(f"{start}{rules.replace('TEXT', 'PLAIN')}{any_tool}")
        start = f"start: call* TEXT\ncall: {marked} {behind}\nTEXT: /(.|\\n)*/\n"
        return self._grammar(f"{start}{rules}{any_tool}")

    def _calls(self, objects: str) -> str:
        return " ".join(part for part in (self._literal(self.before), objects, self._literal(self.after)) if part)

    def _list(self, one: str) -> str:
        return f"{one} ({self._literal(self.between)} {one})*"

    def _any_tool(self, tools: Sequence[Tool], lenient: Sequence[str]) -> str:
        rules = [
            f'tool_{number}: {json.dumps(self._head(tool))} %json {_ANY if tool.name in lenient else tool.schema} "}}"'
            for number, tool in enumerate(tools)
        ]
        return "\n".join([f"any_tool: {' | '.join(f'tool_{number}' for number in range(len(tools)))}", *rules, ""])

    def _head(self, tool: Tool) -> str:
        return f'{{"name": {json.dumps(tool.name)}, "{self.arguments}": '

    def _literal(self, text: str) -> str:
        """A text in Lark, its special tokens as tokens."""
        either = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        parts = re.split(f"({either})", text) if either else [text]
        return " ".join(
            f"<[{self.special[part]}]>" if part in self.special else json.dumps(part) for part in parts if part
        )

    def _grammar(self, rules: str) -> GrammarSource:
        return GrammarSource(GrammarKind.LARK, rules, "tools")


_ANY = '{"type": "object"}'
HERMES = CallFormat(
    "hermes",
    mark="<tool_call>",
    opening="",
    separator="",
    closing="</tool_call>",
    arguments="arguments",
    before="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    after="\n</tool_call>",
)
LLAMA3_JSON = CallFormat(
    "llama3_json",
    mark="<|python_tag|>",
    opening="",
    separator=";",
    closing="",
    arguments="parameters",
    before="",
    between="; ",
    after="",
    is_bare=True,
)
MISTRAL = CallFormat(
    "mistral",
    mark="[TOOL_CALLS]",
    opening="[",
    separator=",",
    closing="]",
    arguments="arguments",
    before="[TOOL_CALLS][",
    between=", ",
    after="]",
)
FORMATS = {form.name: form for form in (HERMES, LLAMA3_JSON, MISTRAL)}


def format_of(template: str) -> CallFormat:
    """The one that a chat template writes; Hermes' where none is recognised, which any base may be told of."""
    return next((form for form in FORMATS.values() if form.mark in template), HERMES)
