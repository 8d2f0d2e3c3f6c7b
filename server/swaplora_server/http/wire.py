"""The bodies of generation requests, as OpenAI defines them and vLLM extends them. Imports no torch."""

from abc import abstractmethod
from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Discriminator, Field, GetJsonSchemaHandler, Tag, field_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, to_json

from swaplora_server.engine.request import SamplingParams
from swaplora_server.http.foreign.fields import NamingBody
from swaplora_server.http.formats import FormatBody
from swaplora_server.http.tools.wire import FunctionCall, ToolBody, ToolCall, ToolCalls
from swaplora_server.http.transport.models import BRANCH, LIST, TEXT, NullMeansDefault, WireModel, text_or_list

MAX_N = 128
MAX_PROMPTS = 2048
MAX_STOPS = 128
MAX_STOP_CHARACTERS = 8192  # of all together, since each is looked for in every token's text
MAX_USER_CHARACTERS = 1024
MAX_TEMPLATE_KWARGS = 64
MAX_TEMPLATE_KWARGS_BYTES = 64 << 10
MAX_PROMPT_TOKENS = 2**22
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16
MAX_SALT_CHARACTERS = 1024
MAX_SEED = 2**63 - 1
NO_SEED = -1  # as vLLM and llama.cpp have it
MAX_INT = 2**31 - 1
MAX_EXACT_FLOAT = 2**53
MAX_BIASES = 1024
MAX_ID_DIGITS = 10
MAX_ALLOWED_TOKENS = 2**18


def _whole(value: object) -> object:
    """A whole number written with a point, as some languages' encoders do, is the number."""
    if isinstance(value, float) and abs(value) <= MAX_EXACT_FLOAT and value.is_integer():
        return int(value)
    return value


def _asks_for_tokens(value: object) -> object:
    if isinstance(value, int | float) and value < 1:
        raise PydanticCustomError("max_tokens", "must be at least 1; leave it out for the default")
    return value


def _asks_for_tokens_or_none(value: object) -> object:
    return value if value == 0 and not isinstance(value, bool) else _asks_for_tokens(value)


def _by_token_ids(value: object) -> object:
    """The names of a JSON object as token ids. Raises for one that is none, before any value is looked at."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("logit_bias", f"may name {MAX_BIASES} tokens")
    for name in value:
        if not (name.isascii() and name.isdigit() and len(name) <= MAX_ID_DIGITS):
            raise PydanticCustomError("logit_bias", 'must be an object of token ids, such as {"42": -100}')
    return {int(name): bias for name, bias in value.items()}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema, or null; what says something of the field stays outside."""
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    about: dict[str, Any] = {key: schema[key] for key in ("title", "description", "default") if key in schema}
    return {"anyOf": [{key: value for key, value in schema.items() if key not in about}, {"type": "null"}], **about}


def _form(value: object) -> str | None:
    """Which form of text or token ids `value` is in: the tag of that branch, so that no other complains."""
    if isinstance(value, str):
        return TEXT
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return _TEXTS if isinstance(first, str) else _LISTS if isinstance(first, list) else _ITEMS


def _forms(description: str) -> Discriminator:
    return Discriminator(_form, "form", f"must be {description}")


_TEXTS, _ITEMS, _LISTS = (f"{BRANCH}{name}" for name in ("texts", "items", "lists"))
Whole = Annotated[int, BeforeValidator(_whole)]
# a list stops at its first complaint: a long one of bad items must not cost more than a good one
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
LogitBias = Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_by_token_ids)]
NumLogprobs = Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)]
Priority = Annotated[Whole, Field(ge=-MAX_INT - 1, le=MAX_INT)]
MaxTokens = Annotated[Whole, BeforeValidator(_asks_for_tokens), Field(ge=1, le=MAX_INT)]
Stop = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True), Tag(_TEXTS)],
    _forms("a string or a list of strings"),
]
Prompt = Annotated[
    Annotated[str, Tag(TEXT)]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag(_TEXTS)]
    | Annotated[TokenIds, Tag(_ITEMS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag(_LISTS)],
    _forms("text, a list of texts, token ids, or a list of lists of token ids"),
]


def prompts_of(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One entry per prompt, whichever of the four forms they came in."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


class StreamOptions(WireModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(NamingBody, FormatBody, NullMeansDefault):
    """What all that generates has in common."""

    has_content: ClassVar[bool] = True
    takes_place: ClassVar[bool] = True

    n: Annotated[Whole, Field(ge=1, le=MAX_N)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[Whole, Field(ge=-1, le=MAX_INT)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: LogitBias | None = None
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS, fail_fast=True)] | None
    ) = None
    seed: Annotated[Whole, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[Whole, Field(ge=0, le=MAX_PROMPT_TOKENS)] = 0
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: NumLogprobs | None = None
    user: Annotated[str, Field(max_length=MAX_USER_CHARACTERS)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None
    priority: Priority = 0

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """With null wherever a field may be left out."""
        found = handler.resolve_ref_schema(handler(schema))
        for name, field in found["properties"].items():
            if name not in found.get("required", ()):
                found["properties"][name] = _or_null(field)
        return found

    @field_validator("stop")
    @classmethod
    def _stop_is_not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and "" in ([value] if isinstance(value, str) else value):
            raise ValueError("a stop string must not be empty")
        if value is not None and sum(map(len, [value] if isinstance(value, str) else value)) > MAX_STOP_CHARACTERS:
            raise ValueError(f"stop strings may have {MAX_STOP_CHARACTERS} characters in all")
        return value

    @property
    def operation(self) -> str:
        """What OpenTelemetry's conventions call it."""
        return "chat"

    @abstractmethod
    def prompt_param(self, number: int) -> str:
        """The field that names its prompt of this number."""

    @property
    def length_param(self) -> str:
        """The field that says how many tokens are wanted."""
        return "max_tokens"

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(
        self, max_tokens: int, num_logprobs: int | None, num_prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """How tokens are chosen; the base's end-of-sequence ids are not in it."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            seed=None if self.seed == NO_SEED else self.seed,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            min_tokens=self.min_tokens,
            num_logprobs=num_logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items()),
            allowed_token_ids=None if self.allowed_token_ids is None else frozenset(self.allowed_token_ids),
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompt
    add_special_tokens: bool = True
    max_tokens: Annotated[Whole, BeforeValidator(_asks_for_tokens_or_none), Field(ge=0, le=MAX_INT)] | None = (
        DEFAULT_MAX_TOKENS
    )
    echo: bool = False
    logprobs: NumLogprobs | None = None
    best_of: Annotated[Whole, Field(ge=1, le=MAX_N)] | None = None

    @cached_property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt, whichever of the four forms it came in."""
        return prompts_of(self.prompt)

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def operation(self) -> str:
        """As conventions call it."""
        return "text_completion"

    def prompt_param(self, number: int) -> str:
        """One of many stands at its place in the list."""
        return f"prompt[{number}]" if len(self.prompts) > 1 else "prompt"


class TextPart(WireModel):
    type: str
    text: str

    @field_validator("type")
    @classmethod
    def _only_text_is_read(cls, value: str) -> str:
        if value != "text":
            raise PydanticCustomError("part_type", "only parts of type text are read here")
        return value


Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[TextPart], Field(max_length=4096, fail_fast=True), Tag(LIST)],
    text_or_list("a string, or a list of parts of type text"),
]


class Message(WireModel):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content | None = None  # OpenAI's clients leave it out beside tool calls
    name: str | None = None
    tool_calls: ToolCalls | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    function_call: FunctionCall | None = None  # OpenAI's before there were tools
    reasoning_content: str | None = None  # of the assistant's, which templates read
    reasoning: str | None = None  # its newer name

    @property
    def says_something(self) -> bool:
        return self.content is not None or bool(self.tool_calls) or self.function_call is not None

    def as_template_input(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        role = "tool" if self.role == "function" else self.role
        calls = list(self.tool_calls or ())
        if self.function_call is not None:
            calls.append(ToolCall(function=self.function_call))
        template_input: dict[str, Any] = {"role": role, "content": content}
        if self.name:
            template_input["name"] = self.name
        if self.tool_call_id is not None:
            template_input["tool_call_id"] = self.tool_call_id
        if reasoning := self.reasoning_content or self.reasoning:
            template_input["reasoning_content"] = reasoning
        if calls:
            template_input["tool_calls"] = [call.for_template() for call in calls]
        return template_input


class ChatBody(GenerationBody, ToolBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: NumLogprobs | None = None
    include_reasoning: bool = True
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_KWARGS)] | None = None
    add_special_tokens: bool = False  # the template has written them
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def prompt_param(self, _number: int) -> str:
        """The messages make the one prompt."""
        return "messages"

    @property
    def length_param(self) -> str:
        """As it was sent."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_kwargs_are_small(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if len(to_json(value)) > MAX_TEMPLATE_KWARGS_BYTES:
            raise ValueError(f"chat_template_kwargs may be {MAX_TEMPLATE_KWARGS_BYTES} bytes of JSON")
        return value

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
