"""How a base writes calls in its text, and the grammar of a text that does."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from swaplora_server.service.grammar.source import GrammarKind, GrammarSource, json_text
from swaplora_server.service.tools.tool import Tool

ANY_OBJECT = '{"type": "object"}'


@dataclass(frozen=True, kw_only=True)
class CallFormat(ABC):
    """One way to write calls, each with a name and arguments, behind a mark."""

    name: str
    mark: str  # what calls begin with
    sign: str = ""  # what a template has that writes so, if not the mark
    before: str  # the first call of a text that is held to calls
    between: str
    after: str
    special: Mapping[str, int] = field(default_factory=dict)  # the parts of it that are tokens which text cannot say

    @property
    @abstractmethod
    def marks(self) -> Sequence[str]:
        """All that a text must show so that its calls can be read."""

    @property
    @abstractmethod
    def example(self) -> str:
        """How a call is written, for a model that does not know."""

    @property
    def has_one_a_mark(self) -> bool:
        """Whether each call has a mark of its own."""
        return True

    @abstractmethod
    def call_text(self, name: str, arguments: Mapping[str, Any]) -> str:
        """One call, between what stands around it."""

    @abstractmethod
    def tool_rules(self, rule: str, tool: Tool, *, is_lenient: bool) -> str:
        """Rules in Lark, first `rule`, of a call of a tool; with any arguments where it `is_lenient`."""

    def of_tokens(self, special: Mapping[int, str]) -> Self:
        """The same, for a base with these special tokens."""
        own = {name: token_id for token_id, name in special.items() if name and any(name in m for m in self.marks)}
        return replace(self, special=own)

    def is_written_by(self, template: str) -> bool:
        """Whether a chat template writes calls so."""
        return (self.sign or self.mark) in template

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls with names and arguments, as a text has them."""
        texts = [self.call_text(call["name"], call["arguments"]) for call in calls]
        return self.before + self.between.join(texts) + self.after

    def calls_only(self, tools: Sequence[Tool], *, is_one: bool) -> GrammarSource:
        """One call of one of `tools` and nothing else, or several."""
        calls = self.calls("any_tool" if is_one else self._list("any_tool"))
        return self.grammar(f"start: {calls}\n{self.any_tool(tools, lenient=())}")

    def text_with_calls(self, tools: Sequence[Tool]) -> GrammarSource:
        """Any text, in which what begins as a call is one; of tools that are not strict with any arguments."""
        calls = "any_tool" if self.has_one_a_mark else self._list("any_tool")
        behind, mark = self.calls(calls, self.before.removeprefix(self.mark)), self.literal(self.mark)
        marked = f"TEXT {mark}" if self.mark in self.special else "marked"
        rules = "" if self.mark in self.special else f"marked[lazy]: TEXT {mark}\n"
        start = f"start: call* TEXT\ncall: {marked} {behind}\nTEXT: /(.|\\n)*/\n"
        return self.grammar(f"{start}{rules}{self.any_tool(tools, _lenient(tools))}")

    def calls(self, calls: str, before: str | None = None) -> str:
        """In Lark, with what stands around them."""
        begin = self.literal(self.before if before is None else before)
        return " ".join(part for part in (begin, calls, self.literal(self.after)) if part)

    def _list(self, one: str) -> str:
        return f"{one} ({self.literal(self.between)} {one})*"

    def any_tool(self, tools: Sequence[Tool], lenient: Sequence[str]) -> str:
        """Rules of a call of any of them."""
        rules = [
            self.tool_rules(f"tool_{number}", tool, is_lenient=tool.name in lenient)
            for number, tool in enumerate(tools)
        ]
        return "\n".join([f"any_tool: {' | '.join(f'tool_{number}' for number in range(len(tools)))}", *rules, ""])

    def literal(self, text: str) -> str:
        """A text in Lark, its special tokens as tokens."""
        either = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        parts = re.split(f"({either})", text) if either else [text]
        return " ".join(
            f"<[{self.special[part]}]>" if part in self.special else json.dumps(part) for part in parts if part
        )

    def grammar(self, rules: str) -> GrammarSource:
        return GrammarSource(GrammarKind.LARK, rules, "tools")


def _lenient(tools: Sequence[Tool]) -> list[str]:
    return [tool.name for tool in tools if not tool.is_strict]


@dataclass(frozen=True, kw_only=True)
class ObjectCalls(CallFormat):
    """Calls as objects with a name and arguments, or as a name and then the arguments."""

    opening: str = ""  # behind the mark, before the first
    separator: str = ""  # between two; "" where each has a mark of its own
    closing: str = ""  # behind the last
    arguments: str = "arguments"  # what an object calls them
    named: str = ""  # what stands between a name and its arguments, where a call may be these
    numbered: str = ""  # what may stand before that, and an id
    writes_named: bool = False
    is_bare: bool = False  # whether a text that begins with a call needs no mark

    @property
    def marks(self) -> Sequence[str]:
        return [mark for mark in (self.mark, self.closing, self.named, self.numbered) if mark]

    @property
    def example(self) -> str:
        return f'{self.before}{{"name": NAME, "{self.arguments}": ARGUMENTS}}{self.after}'

    @property
    def has_one_a_mark(self) -> bool:
        return not self.separator or self.writes_named

    def call_text(self, name: str, arguments: Mapping[str, Any]) -> str:
        if self.writes_named:
            return f"{name}{self.named}{json_text(arguments)}"
        return json_text({"name": name, self.arguments: arguments})

    def tool_rules(self, rule: str, tool: Tool, *, is_lenient: bool) -> str:
        schema = ANY_OBJECT if is_lenient else tool.schema
        if self.writes_named:
            return f"{rule}: {self.literal(tool.name + self.named)} %json {schema}"
        head = f'{{"name": {json.dumps(tool.name)}, "{self.arguments}": '
        return f'{rule}: {json.dumps(head)} %json {schema} "}}"'

    def text_with_calls(self, tools: Sequence[Tool]) -> GrammarSource:
        if not self.is_bare:
            return super().text_with_calls(tools)
        calls, mark = self.calls(self._list("any_tool")), self.literal(self.mark)
        is_token = self.mark in self.special
        without = "" if is_token else f" & ~/(?s:.*){re.escape(self.mark).replace('/', chr(92) + '/')}(?s:.*)/"
        plain = rf"PLAIN: /(\s*[^\s{{](.|\n)*)?/{without}"
        marked, rules = (f"PLAIN {mark}", "") if is_token else ("marked", f"marked[lazy]: PLAIN {mark}\n")
        start = f"start: {calls} | PLAIN | {marked} {calls}\n{plain}\n"
        return self.grammar(f"{start}{rules}{self.any_tool(tools, _lenient(tools))}")


HERMES = ObjectCalls(
    name="hermes",
    mark="<tool_call>",
    closing="</tool_call>",
    before="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    after="\n</tool_call>",
)
LLAMA3_JSON = ObjectCalls(
    name="llama3_json",
    mark="<|python_tag|>",
    separator=";",
    arguments="parameters",
    before="",
    between="; ",
    after="",
    is_bare=True,
)
MISTRAL = ObjectCalls(
    name="mistral",
    mark="[TOOL_CALLS]",
    opening="[",
    separator=",",
    closing="]",
    named="[ARGS]",
    numbered="[CALL_ID]",
    before="[TOOL_CALLS][",
    between=", ",
    after="]",
)
MISTRAL_NAMED = replace(
    MISTRAL, sign="[ARGS]", writes_named=True, before="[TOOL_CALLS]", between="[TOOL_CALLS]", after=""
)
