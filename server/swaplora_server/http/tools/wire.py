"""Tools, calls and results in the bodies of chats, as OpenAI defines them. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from swaplora_server.http.transport.models import WireModel
from swaplora_server.service.errors import RequestError
from swaplora_server.service.grammar.source import GrammarSource
from swaplora_server.service.tools.reader import CallReader
from swaplora_server.service.tools.tool import Tool, calls_only, text_with_calls

MAX_TOOLS = 128
MAX_CALLS = 128
MAX_DESCRIPTION_CHARACTERS = 65_536
MAX_ARGUMENT_CHARACTERS = 2**20

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class Function(WireModel):
    name: ToolName
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARACTERS)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        return Tool(self.name, self.description, self.parameters, bool(self.strict))


class FunctionTool(WireModel):
    type: Literal["function"]
    function: Function


class Named(WireModel):
    name: ToolName


class NamedTool(WireModel):
    type: Literal["function"] = "function"
    function: Named


class FunctionCall(WireModel):
    name: ToolName
    arguments: Annotated[str, Field(max_length=MAX_ARGUMENT_CHARACTERS)] = "{}"

    @field_validator("arguments")
    @classmethod
    def _arguments_are_an_object(cls, value: str) -> str:
        try:
            is_object = isinstance(json.loads(value or "{}"), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise ValueError("must be a JSON object, as text")
        return value

    def for_template(self) -> dict[str, Any]:
        """With its arguments as an object, as templates want them."""
        return {"name": self.name, "arguments": json.loads(self.arguments or "{}")}


class ToolCall(WireModel):
    id: Annotated[str, Field(max_length=256)] = ""
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        named = {"id": self.id} if self.id else {}
        return {**named, "type": "function", "function": self.function.for_template()}


Tools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)]
Functions = Annotated[list[Function], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolCalls = Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool
FunctionChoice = Literal["none", "auto"] | Named


class ToolBody(WireModel):
    """The fields of a chat that say what may be called: tools, or as OpenAI had it before, functions."""

    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: FunctionChoice | None = None

    def tool_use(self) -> "ToolUse | None":
        """What may be called; None where nothing is to be. Raises RequestError for fields that do not go together."""
        if self.functions and self.tools:
            raise _refusal("functions", "are what tools were called before: send one of them")
        param, choice_param = ("functions", "function_call") if self.functions else ("tools", "tool_choice")
        given = [tool.function for tool in self.tools or ()] or self.functions or []
        names = [function.name for function in given]
        if len(set(names)) < len(names):
            raise _refusal(param, "has two functions of one name")
        choice = self.function_call if self.functions else self.tool_choice
        named = _name_in(choice)
        if (named or choice == "required") and not given:
            raise _refusal(choice_param, f"needs {param}")
        if named is not None and named not in names:
            raise _refusal(choice_param, f"names {named!r}, which is not among {param}")
        if choice == "none" or not given:
            return None
        is_one = bool(self.functions) or self.parallel_tool_calls is False
        tools = tuple(function.tool() for function in given)
        return ToolUse(tools, named, choice == "required", is_one, bool(self.functions))


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What one chat may call, and how its calls are written."""

    tools: Sequence[Tool]
    named: str | None  # the one that must be called
    is_required: bool
    is_one: bool  # whether no more than one call is wanted
    is_legacy: bool

    @property
    def definitions(self) -> list[dict[str, Any]]:
        return [tool.definition for tool in self.tools]

    def source(self) -> GrammarSource | None:
        """What the text must keep to so that calls are what they are to be."""
        if self.named is not None:
            return calls_only([tool for tool in self.tools if tool.name == self.named], is_one=True)
        if self.is_required:
            return calls_only(self.tools, is_one=self.is_one)
        return text_with_calls(self.tools) if any(tool.is_strict for tool in self.tools) else None

    def reader(self) -> CallReader:
        return CallReader({tool.name for tool in self.tools}, is_one=self.is_one)

    def finish_reason(self, reason: str | None, num_calls: int) -> str | None:
        """OpenAI's, of a text with so many calls that ended by `reason`: a call asked for by name is no news."""
        if reason != "stop" or not num_calls or self.named is not None:
            return reason
        return "function_call" if self.is_legacy else "tool_calls"


def _name_in(choice: object) -> str | None:
    if isinstance(choice, NamedTool):
        return choice.function.name
    return choice.name if isinstance(choice, Named) else None


def _refusal(field: str, words: str) -> RequestError:
    return RequestError("invalid_request", f"{field} {words}", field)
