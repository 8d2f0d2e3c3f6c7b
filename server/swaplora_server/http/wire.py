"""The bodies of generation requests, as OpenAI defines them and vLLM extends them. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from swaplora_server.engine.request import SamplingParams
from swaplora_server.http.body import ClosedModel, WireModel

MAX_N = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_PROMPT_TOKENS = 2**22
MAX_LOGPROBS = 20
MAX_SALT_CHARACTERS = 1024
MAX_TERMS = 16
MAX_SCALE = 1000.0
MAX_SEED = 2**63 - 1
MAX_INT = 2**31 - 1

# a list stops at its first complaint: a long one of bad items must not cost more than a good one
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]

# fields that clients of OpenAI's or vLLM's API send and that would change the answer, with the values that would not
UNSUPPORTED_ANYWHERE: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "use_beam_search": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "response_format": ({"type": "text"},),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "logits_processors": ([],),
    "lora_request": (),
    "lora_path": (),  # what other servers call the field that names an adapter
    "adapter_id": (),
    "adapter_source": (),
    "regex": (),
    "ebnf": (),
    "grammar": (),
    "json_schema": (),
    "structural_tag": (),
    "stop_regex": (),
    "typical_p": (1,),
    "mirostat": (0,),
    "return_tokens_as_token_ids": (False,),
    "thinking_token_budget": (),
    "mm_processor_kwargs": (),
    "priority": (0,),
    "vllm_xargs": ({},),
    "kv_transfer_params": (),
    "add_special_tokens": (),
    "spaces_between_special_tokens": (True,),
}
UNSUPPORTED_COMPLETION = UNSUPPORTED_ANYWHERE | {
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (),
    "prompt_embeds": (),
}
UNSUPPORTED_CHAT = UNSUPPORTED_ANYWHERE | {
    "echo": (False,),
    "include_reasoning": (True,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    "documents": ([],),
    "chat_template": (),
    "verbosity": (),
    "moderation": (),
}


UNSUPPORTED_MESSAGE: dict[str, tuple[object, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "reasoning_content": ("",),
    "reasoning": ("",),
}


class StreamOptions(WireModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class AdapterTerm(ClosedModel):
    """One adapter of a weighted sum."""

    name: ModelName
    scale: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)] = 1.0


class GenerationBody(WireModel):
    """What completions and chat completions share. `adapters` are added to the base, which is then the model."""

    model: ModelName
    adapters: Annotated[list[AdapterTerm], Field(max_length=MAX_TERMS, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, le=MAX_SEED - MAX_N)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=MAX_PROMPT_TOKENS)] = 0
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _null_means_default(cls, value: object, info: Any) -> object:
        """OpenAI's clients send null for what they leave open."""
        field = cls.model_fields[info.field_name]
        return field.default if value is None and not field.is_required() else value

    @field_validator("stop")
    @classmethod
    def _stop_is_not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and "" in ([value] if isinstance(value, str) else value):
            raise ValueError("a stop string must not be empty")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, max_tokens: int, eos_token_ids: frozenset[int], num_logprobs: int | None) -> SamplingParams:
        """What the engine is told; the end-of-sequence ids stop a request unless it ignores them."""
        own = frozenset(self.stop_token_ids or ())
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            seed=self.seed,
            stop_token_ids=own if self.ignore_eos else own | eos_token_ids,
            min_tokens=self.min_tokens,
            num_logprobs=num_logprobs,
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = 16

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt, whichever of the four forms it came in."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(WireModel):
    type: Literal["text"]
    text: str


class Message(WireModel):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(max_length=4096, fail_fast=True)]
    name: str | None = None

    def as_template_input(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
