"""The body of POST /v1/messages, as Anthropic defines it: messages of blocks, tools, and the text's format."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from swaplora_server.http.dialogue.turns import (
    MAX_ITEMS,
    Block,
    CallId,
    Said,
    Turn,
    Turns,
    text_of,
    unread,
)
from swaplora_server.http.formats import SchemaText, schema_source
from swaplora_server.http.tools.wire import (
    MAX_DESCRIPTION_CHARACTERS,
    MAX_TOOLS,
    Choice,
    Schema,
    ToolName,
    ToolUse,
    use_of,
)
from swaplora_server.http.transport.models import BRANCH, LIST, TEXT, ClosedModel, WireModel, text_or_list
from swaplora_server.http.wire import MAX_STOPS, MAX_USER_CHARACTERS, GenerationBody, MaxTokens
from swaplora_server.service.errors import RequestError
from swaplora_server.service.grammar.source import GrammarSource
from swaplora_server.service.tools.tool import Tool


class ToolUseBlock(WireModel):
    """What the model called."""

    type: Literal["tool_use"]
    id: CallId
    name: ToolName
    input: dict[str, Any]


class ToolResultBlock(WireModel):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Said | None = None
    is_error: bool | None = None


class ThinkingBlock(WireModel):
    """How the model reasoned. Its signature is none of ours."""

    type: Literal["thinking"]
    thinking: str


_KINDS = ("tool_use", "tool_result", "thinking")


def _kind(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return None
    kind = value.get("type")
    return f"{BRANCH}{kind if kind in _KINDS else 'block'}"


AnyBlock = Annotated[
    Annotated[Block, Tag(f"{BRANCH}block")]
    | Annotated[ToolUseBlock, Tag(f"{BRANCH}tool_use")]
    | Annotated[ToolResultBlock, Tag(f"{BRANCH}tool_result")]
    | Annotated[ThinkingBlock, Tag(f"{BRANCH}thinking")],
    Discriminator(_kind, "form", "must be a block: an object with a type"),
]
Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[AnyBlock], Field(max_length=MAX_ITEMS, fail_fast=True), Tag(LIST)],
    text_or_list("a string, or a list of blocks"),
]


class Metadata(WireModel):
    user_id: Annotated[str, Field(max_length=MAX_USER_CHARACTERS)] | None = None


class AnthropicMessage(WireModel):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content


class AnthropicTool(WireModel):
    type: Literal["custom"] | None = None
    name: ToolName
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARACTERS)] | None = None
    input_schema: Schema
    strict: bool | None = None


class AnthropicChoice(WireModel):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None

    def choice(self) -> Choice:
        """Raises RequestError for a name too much or too few."""
        if (self.name is not None) != (self.type == "tool"):
            words = "is needed with" if self.name is None else "does not go with"
            path = "tool_choice.name"
            raise RequestError("invalid_request", f"{path} {words} the type {self.type!r}", path)
        return Choice("none" if self.type == "none" else "required" if self.type == "any" else "auto", self.name)


class OutputFormat(ClosedModel):
    type: Literal["json_schema"]
    schema_: Annotated[SchemaText, Field(alias="schema")]


class OutputConfig(ClosedModel):
    format: OutputFormat | None = None
    effort: Literal["high"] | None = None  # what Anthropic does by itself


class Thinking(WireModel):
    """Whether it is told; `budget_tokens` is a wish that no model here is held to."""

    type: Literal["enabled", "adaptive", "disabled"]


class CountBody(GenerationBody):
    """POST /v1/messages/count_tokens, and what it has in common with the answer to it."""

    takes_place: ClassVar[bool] = False

    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    system: Said | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # where it stood before

    @property
    def tells_thoughts(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"

    @property
    def variables(self) -> dict[str, Any]:
        """Of the chat template."""
        return {} if self.thinking is None else {"enable_thinking": self.tells_thoughts}

    def prompt_param(self, _number: int) -> str:
        """The messages make the one prompt."""
        return "messages"

    def tool_use(self) -> ToolUse | None:
        """What may be called; None where nothing is to be. Raises RequestError for fields that do not go together."""
        asked = self.tool_choice or AnthropicChoice(type="auto")
        tools = [Tool(tool.name, tool.description, tool.input_schema, bool(tool.strict)) for tool in self.tools or ()]
        return use_of(tools, asked.choice(), is_one=bool(asked.disable_parallel_tool_use))

    def turns(self) -> list[Turn]:
        """All that was said. Raises RequestError for what has no place in a conversation."""
        turns = Turns()
        if self.system:
            turns.say("system", text_of(self.system, "system"))
        for number, message in enumerate(self.messages):
            _take(turns, message, f"messages[{number}].content")
        return turns.all()

    def _sources(self) -> Iterator[GrammarSource]:
        yield from super()._sources()
        of_config = self.output_config.format if self.output_config else None
        for path, format in (("output_config.format", of_config), ("output_format", self.output_format)):
            if format is not None:
                yield schema_source(f"{path}.schema", format.schema_)


class MessagesBody(CountBody):
    """POST /v1/messages."""

    takes_place: ClassVar[bool] = True

    max_tokens: MaxTokens
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    metadata: Metadata | None = None


def _take(turns: Turns, message: AnthropicMessage, path: str) -> None:
    """Its results first, which answer what was said before; then its text, and then what it calls."""
    if isinstance(message.content, str):
        turns.say(message.role, message.content)
        return
    text, thought, num_results = "", "", 0
    calls: list[tuple[str, ToolUseBlock]] = []
    for number, block in enumerate(message.content):
        place = f"{path}[{number}]"
        match block, message.role:
            case ToolResultBlock(), "user":
                turns.give(block.tool_use_id, _result(block, place), f"{place}.tool_use_id")
                num_results += 1
            case ThinkingBlock(), "assistant":
                thought += block.thinking
            case ToolUseBlock(), "assistant":
                calls.append((place, block))
            case Block(), _:
                text += text_of([block], path) if block.type == "text" else _refuse(block, place, message.role)
            case _:
                _refuse(block, place, message.role)
    if thought:
        turns.think(thought)
    if text or not (calls or num_results):
        turns.say(message.role, text)
    elif calls:
        turns.say(message.role, "")
    for place, call in calls:
        turns.call(call.id, call.name, call.input, f"{place}.id")


def _refuse(block: Block | ToolUseBlock | ToolResultBlock | ThinkingBlock, path: str, role: str) -> str:
    own = {"user": ["tool_result"], "assistant": ["tool_use", "thinking"]}.get(role, [])
    raise unread(path, block.type, ["text", *own])


def _result(block: ToolResultBlock, path: str) -> str:
    text = text_of(block.content or "", f"{path}.content")
    return f"Error: {text}" if block.is_error else text  # templates have no place for it
