"""The body of POST /v1/responses, as OpenAI defines it: what was said as items, tools, and the text's format."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from swaplora_server.http.dialogue.turns import (
    MAX_ITEMS,
    Block,
    CallId,
    Said,
    Turn,
    Turns,
    Type,
    text_of,
)
from swaplora_server.http.formats import (
    ANY_OBJECT,
    MAX_DESCRIPTION_CHARACTERS,
    MAX_NAME_CHARACTERS,
    SchemaText,
    schema_source,
)
from swaplora_server.http.tools.wire import (
    CHOICE_FORM,
    MAX_TOOLS,
    OBJECT,
    Choice,
    Function,
    FunctionCall,
    Named,
    ToolMode,
    ToolUse,
    arguments_in,
    use_of,
)
from swaplora_server.http.transport.models import BRANCH, LIST, TEXT, ClosedModel, WireModel, text_or_list
from swaplora_server.http.wire import GenerationBody, MaxTokens
from swaplora_server.service.errors import RequestError
from swaplora_server.service.grammar.source import GrammarKind, GrammarSource

_PARTS = ("input_text", "output_text", "text")
_ROLES = {"developer": "system"}  # the newer name of the same role


class MessageItem(WireModel):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    content: Said | None = None


class CallItem(FunctionCall):
    """What the model called."""

    type: Literal["function_call"]
    call_id: CallId


class ResultItem(WireModel):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Said


class ReasoningItem(WireModel):
    """How the model reasoned: what it wrote, or else a summary of it."""

    type: Literal["reasoning"]
    summary: Annotated[list[Block], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    content: Annotated[list[Block], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None


class OtherItem(WireModel):
    """Refused by its type."""

    type: Type


_KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _kind(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return None
    kind = value.get("type", "message")
    return f"{BRANCH}{kind if isinstance(kind, str) and kind in _KINDS else 'other'}"


Item = Annotated[
    Annotated[MessageItem, Tag(f"{BRANCH}message")]
    | Annotated[CallItem, Tag(f"{BRANCH}function_call")]
    | Annotated[ResultItem, Tag(f"{BRANCH}function_call_output")]
    | Annotated[ReasoningItem, Tag(f"{BRANCH}reasoning")]
    | Annotated[OtherItem, Tag(f"{BRANCH}other")],
    Discriminator(_kind, "form", "must be an object: a message, a call or its output"),
]
Input = Annotated[
    Annotated[str, Tag(TEXT)]
    | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True), Tag(LIST)],
    text_or_list("a text, or a list of items"),
]


class _Typed(WireModel):
    type: Literal["function"]


class ResponseTool(Function, _Typed):
    """Its type is looked at first, as tools of other types have other fields."""


class NamedChoice(Named):
    type: Literal["function"]


class TextFormat(ClosedModel):
    """OpenAI's here: what is under `json_schema` in a chat's `response_format` stands in it itself."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)] | None = None
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARACTERS)] | None = None
    schema_: Annotated[SchemaText | None, Field(alias="schema")] = None
    strict: bool | None = None

    def source(self) -> GrammarSource | None:
        """None for plain text. Raises RequestError for a schema that does not go with the type, or is missing."""
        path = "text.format.schema"
        if (self.schema_ is not None) != (self.type == "json_schema"):
            words = "is needed with" if self.schema_ is None else "does not go with"
            raise RequestError("invalid_request", f"{path} {words} the type {self.type!r}", path)
        if self.type == "text":
            return None
        return schema_source(path, ANY_OBJECT if self.schema_ is None else self.schema_)


class TextConfig(ClosedModel):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(ClosedModel):
    """Whether there is to be any; a summary is not made, the reasoning itself is told."""

    effort: Literal["none"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseBody(GenerationBody):
    """POST /v1/responses."""

    input: Input
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[ToolMode | Annotated[NamedChoice, Tag(OBJECT)], CHOICE_FORM] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """Of the chat template."""
        return {"enable_thinking": False} if self.reasoning and self.reasoning.effort == "none" else {}

    def prompt_param(self, _number: int) -> str:
        """The one prompt is made of it."""
        return "input"

    @property
    def length_param(self) -> str:
        """As OpenAI calls it here."""
        return "max_output_tokens"

    def tool_use(self) -> ToolUse | None:
        """What may be called; None where nothing is to be. Raises RequestError for fields that do not go together."""
        choice = self.tool_choice
        asked = Choice(named=choice.name) if isinstance(choice, NamedChoice) else Choice(choice or "auto")
        tools = [tool.tool() for tool in self.tools or ()]
        return use_of(tools, asked, is_one=self.parallel_tool_calls is False)

    def turns(self) -> list[Turn]:
        """All that was said. Raises RequestError for what has no place in a conversation."""
        turns = Turns()
        if self.instructions:
            turns.say("system", self.instructions)
        if isinstance(self.input, str):
            turns.say("user", self.input)
        else:
            for number, item in enumerate(self.input):
                _take(turns, item, f"input[{number}]")
        return turns.all()

    def told_format(self) -> dict[str, Any]:
        """What the text keeps to, as OpenAI writes it in a response. For formats that were compiled."""
        source = self.format_source()
        if source is None:
            return {"type": "text"}
        if source.kind is not GrammarKind.JSON_SCHEMA:
            return {"type": "text", source.kind.value: source.text}
        if source.text == ANY_OBJECT:
            return {"type": "json_object"}
        own = self.text.format if self.text else None
        named = own or (self.response_format.json_schema if self.response_format else None)
        told = {"name": (named.name if named else None) or "schema", "strict": True, "schema": json.loads(source.text)}
        return {"type": "json_schema", "description": named.description if named else None, **told}

    def _sources(self) -> Iterator[GrammarSource]:
        yield from super()._sources()
        if self.text is not None and self.text.format is not None and (source := self.text.format.source()):
            yield source


def _take(turns: Turns, item: MessageItem | CallItem | ResultItem | ReasoningItem | OtherItem, path: str) -> None:
    match item:
        case MessageItem(role=str(role), content=content) if content is not None:
            turns.say(_ROLES.get(role, role), text_of(content, f"{path}.content", _PARTS))
        case MessageItem(role=role):
            missing = "role" if role is None else "content"
            raise RequestError("invalid_request", f"{path}.{missing} is needed", f"{path}.{missing}")
        case CallItem():
            turns.call(item.call_id, item.name, arguments_in(item.arguments) or {}, f"{path}.call_id")
        case ResultItem():
            turns.give(item.call_id, text_of(item.output, f"{path}.output", _PARTS), f"{path}.call_id")
        case ReasoningItem(content=content, summary=summary):
            turns.think(text_of(content or summary or [], path, ("reasoning_text", "summary_text")))
        case OtherItem():
            words = f"items of type {item.type!r} are not supported yet: send {', '.join(_KINDS)}"
            raise RequestError("unsupported_field", f"{path}.type: {words}", f"{path}.type")
