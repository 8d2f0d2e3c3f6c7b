"""Tools, calls and results in the bodies of chats, as OpenAI defines them, and what a body may have called.

Imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, PlainValidator, Tag, field_validator

from swaplora_server.http.transport.models import BRANCH, WireModel
from swaplora_server.service.errors import RequestError
from swaplora_server.service.grammar.source import GrammarSource, body_text
from swaplora_server.service.tools.call_format import CallFormat
from swaplora_server.service.tools.readers import Reader, reader_of
from swaplora_server.service.tools.tool import Parameters, Tool

MAX_TOOLS = 128
MAX_CALLS = 128
MAX_DESCRIPTION_CHARACTERS = 65_536
MAX_ARGUMENT_CHARACTERS = 2**20

WORD, OBJECT = f"{BRANCH}word", f"{BRANCH}object"


def _choice_form(value: object) -> str | None:
    return WORD if isinstance(value, str) else OBJECT if isinstance(value, Mapping) else None


CHOICE_FORM = Discriminator(_choice_form, "form", "must be none, auto, required, or a function by its name")
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


def _parameters(value: object) -> Parameters:
    """Raises ValueError for what is no schema."""
    if not isinstance(value, dict):
        raise ValueError("must be a JSON schema: an object")
    return Parameters(value, body_text(value))


# a schema becomes a text while its body is read, which for large ones is not on the event loop
Schema = Annotated[Parameters, PlainValidator(_parameters, json_schema_input_type=dict[str, Any])]


class Function(WireModel):
    name: ToolName
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARACTERS)] | None = None
    parameters: Schema | None = None
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


def arguments_in(text: str) -> dict[str, Any] | None:
    """The object that a call's arguments are, or None for what is none."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class FunctionCall(WireModel):
    name: ToolName
    arguments: Annotated[str, Field(max_length=MAX_ARGUMENT_CHARACTERS)] = "{}"

    @field_validator("arguments")
    @classmethod
    def _arguments_are_an_object(cls, value: str) -> str:
        if arguments_in(value) is None:
            raise ValueError("must be a JSON object, as text")
        return value

    def for_template(self) -> dict[str, Any]:
        """With its arguments as an object, as templates want them."""
        return {"name": self.name, "arguments": arguments_in(self.arguments)}


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
ToolMode = Annotated[Literal["none", "auto", "required"], Tag(WORD)]
ToolChoice = Annotated[ToolMode | Annotated[NamedTool, Tag(OBJECT)], CHOICE_FORM]
FunctionChoice = Annotated[Annotated[Literal["none", "auto"], Tag(WORD)] | Annotated[Named, Tag(OBJECT)], CHOICE_FORM]


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
        if self.functions:
            tools = [function.tool() for function in self.functions]
            return use_of(tools, _choice(self.function_call), is_one=True, is_legacy=True)
        tools = [tool.function.tool() for tool in self.tools or ()]
        return use_of(tools, _choice(self.tool_choice), is_one=self.parallel_tool_calls is False)


class Choice(NamedTuple):
    """Whether something is to be called: none, auto or required; or what, by its name."""

    mode: Literal["none", "auto", "required"] = "auto"
    named: str | None = None


def use_of(tools: Sequence[Tool], choice: Choice, *, is_one: bool = False, is_legacy: bool = False) -> "ToolUse | None":
    """What may be called; None where nothing is to be. Raises RequestError where these do not go together."""
    param, choice_param = ("functions", "function_call") if is_legacy else ("tools", "tool_choice")
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise _refusal(param, "has two functions of one name")
    if (choice.named or choice.mode == "required") and not tools:
        raise _refusal(choice_param, f"needs {param}")
    if choice.named is not None and choice.named not in names:
        raise _refusal(choice_param, f"names {choice.named!r}, which is not among {param}")
    if choice.mode == "none" or not tools:
        return None
    return ToolUse(tuple(tools), choice.named, choice.mode == "required", is_one, is_legacy)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What one chat may call, and how its calls are written."""

    tools: Sequence[Tool]
    named: str | None  # the one that must be called
    is_required: bool
    is_one: bool  # whether no more than one call is wanted
    is_legacy: bool

    @property
    def is_held(self) -> bool:
        """Whether the text is calls and nothing else."""
        return self.is_required or self.named is not None

    def source(self, form: CallFormat) -> GrammarSource | None:
        """What the text must keep to so that calls are what they are to be."""
        if self.named is not None:
            return form.calls_only([tool for tool in self.tools if tool.name == self.named], is_one=True)
        if self.is_required:
            return form.calls_only(self.tools, is_one=self.is_one)
        return form.text_with_calls(self.tools) if any(tool.is_strict for tool in self.tools) else None

    def reader(self, form: CallFormat) -> Reader:
        return reader_of(form, self.tools, is_one=self.is_one)

    def finish_reason(self, reason: str | None, num_calls: int) -> str | None:
        """OpenAI's, of a text with so many calls that ended by `reason`: a call asked for by name is no news."""
        if reason != "stop" or not num_calls or self.named is not None:
            return reason
        return "function_call" if self.is_legacy else "tool_calls"


def _choice(value: str | NamedTool | Named | None) -> Choice:
    match value:
        case NamedTool(function=Named(name=name)) | Named(name=name):
            return Choice(named=name)
        case "none" | "auto" | "required":
            return Choice(value)
        case _:
            return Choice()


def _refusal(field: str, words: str) -> RequestError:
    return RequestError("invalid_request", f"{field} {words}", field)
