"""What clients of OpenAI's and vLLM's API may send and is not honoured: each field, what it may be, what to do instead.

This table is the one place; the list in docs/api.md is made of it. Imports no torch.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog
from pydantic import BaseModel

from swaplora_server.service.errors import RequestError

_log = structlog.get_logger(__name__)
_MAX_UNKNOWN_FIELDS = 64
_MAX_NAMED = 32


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that would change the answer, unless it is null or one of the `neutral` values, which ask for nothing."""

    neutral: tuple[object, ...] = ()
    instead: str = ""
    same_as: str | None = None  # a field of the body whose value asks for nothing either

    def allows(self, value: object, body: BaseModel) -> bool:
        """Whether `value` asks for nothing."""
        if value is None or value in self.neutral:
            return True
        return self.same_as is not None and value == getattr(body, self.same_as)

    @property
    def remedy(self) -> str:
        """What to do, in a few words."""
        values = [json.dumps(value) for value in self.neutral] + ([f"what {self.same_as} is"] if self.same_as else [])
        leave = " or ".join(["leave it out", *([f"send {', '.join(values)}"] if values else [])])
        return f"{leave}; {self.instead}" if self.instead else leave


_NAME_IT = "name the adapter in model"
_NAMES_ADAPTER = re.compile("lora|adapter", re.IGNORECASE)
_UNKNOWN_ADAPTER = Refusal(("", [], {}, False), _NAME_IT)  # left unread, the base would answer
_ZERO, _ONE, _OFF, _ON, _EMPTY = Refusal((0,)), Refusal((1,)), Refusal((False,)), Refusal((True,)), Refusal(([],))

ANYWHERE: dict[str, Refusal] = {
    "length_penalty": _ONE,
    "use_beam_search": _OFF,
    "bad_words": _EMPTY,
    "guided_whitespace_pattern": Refusal(("",), "white space in JSON is bounded here"),
    "stop_regex": Refusal(("", []), "stop takes plain strings"),
    "truncate_prompt_tokens": Refusal(instead="send a prompt that fits"),
    "detokenize": Refusal((True,), "return_token_ids gives the ids beside the text"),
    "spaces_between_special_tokens": _ON,
    "return_tokens_as_token_ids": Refusal((False,), "return_token_ids gives the ids beside the text"),
    "logits_processors": _EMPTY,
    "typical_p": _ONE,
    "mirostat": _ZERO,
    "lora_request": Refusal(instead=_NAME_IT),
    "merged_adapters": Refusal(instead="adapters adds deltas, and POST /v1/merged makes one adapter of several"),
    "adapter_source": Refusal(("local",), "PUT /v1/adapters/NAME takes the source, and model the name"),
    "parameters": Refusal(({},), "send what it holds beside model, which names the adapter"),
    "mm_processor_kwargs": Refusal(({},)),
    "thinking_token_budget": Refusal(),
    "kv_transfer_params": Refusal(),
    "vllm_xargs": Refusal(({},)),
    "store": Refusal((True, False)),  # no answer is kept: whoever looks for one is told so
    "service_tier": Refusal(("auto", "default", "flex", "scale", "priority")),  # answers say which it was
}
COMPLETION: dict[str, Refusal] = ANYWHERE | {
    "suffix": Refusal(("",), "what comes after the gap is not looked at"),
    "prompt_embeds": Refusal(instead="send text or token ids"),
    "max_completion_tokens": Refusal(instead="max_tokens says how many here"),
    "top_logprobs": Refusal(instead="logprobs says how many here"),
}
CHAT: dict[str, Refusal] = ANYWHERE | {
    "echo": _OFF,
    "best_of": Refusal(same_as="n", instead="ask for n, and choose"),
    "modalities": Refusal((["text"],), "the answer is text"),
    "audio": Refusal(instead="the answer is text"),
    "reasoning_effort": Refusal(("none",), "chat_template_kwargs may know a switch of the base's"),
    "verbosity": Refusal(("medium",)),
    "web_search_options": Refusal(),
    "moderation": Refusal(),
    "documents": Refusal(([],), "put them into a message"),
    "chat_template": Refusal(instead="the base's own is used; /v1/completions takes what you rendered yourself"),
}
_DIALOGUE: dict[str, Refusal] = ANYWHERE | {
    "echo": _OFF,
    "best_of": _ONE,
    "logprobs": _OFF,
    "top_logprobs": _ZERO,
}
RESPONSE: dict[str, Refusal] = _DIALOGUE | {
    "max_tokens": Refusal(instead="max_output_tokens says how many here"),
    "max_completion_tokens": Refusal(instead="max_output_tokens says how many here"),
    "messages": Refusal(([],), "send them as input"),
    "previous_response_id": Refusal(instead="no answer is kept here: send the whole conversation as input"),
    "conversation": Refusal(instead="none is kept here: send the whole conversation as input"),
    "background": Refusal((False,), "wait for the answer, or have it streamed"),
    "prompt": Refusal(instead="send it as instructions"),
    "max_tool_calls": Refusal(),
    "include": _EMPTY,
    "truncation": Refusal(("disabled",), "send a conversation that fits"),
    "context_management": _EMPTY,
    "moderation": Refusal(),
}
ANTHROPIC: dict[str, Refusal] = _DIALOGUE | {
    "max_completion_tokens": Refusal(instead="max_tokens says how many here"),
    "service_tier": Refusal(("auto", "standard_only")),
    "container": Refusal(),
    "mcp_servers": _EMPTY,
    "context_management": Refusal(),
    "speed": Refusal(("standard",)),
}
_WHOLE: dict[str, Refusal] = {
    "lora_request": Refusal(instead=_NAME_IT),
    "merged_adapters": Refusal(instead="adapters adds deltas, and POST /v1/merged makes one adapter of several"),
    "adapter_source": Refusal(("local",), "PUT /v1/adapters/NAME takes the source, and model the name"),
    "parameters": Refusal(({},), "send what it holds beside model, which names the adapter"),
    "mm_processor_kwargs": Refusal(({},)),
    "vllm_xargs": Refusal(({},)),
}
EMBEDDING: dict[str, Refusal] = {
    "messages": Refusal(([],), "send the text as input"),
    "embed_dtype": Refusal(("float32",), "numbers are float32"),
    "endianness": Refusal(("native", "little"), "base64 holds little-endian numbers"),
    **_WHOLE,
}
_CUTS = Refusal((False, "none", "NONE"), "truncate_prompt_tokens says how much is kept, of which -1 is what fits")
POOLING: dict[str, Refusal] = EMBEDDING | {
    "data": Refusal(instead="send the text as input"),
    "normalize": Refusal(instead="use_activation says it here"),
    "softmax": Refusal(instead="use_activation says it here"),
    "activation": Refusal(instead="use_activation says it here"),
}
SCORING: dict[str, Refusal] = _WHOLE | {
    "softmax": Refusal(instead="use_activation says it here"),
    "activation": Refusal(instead="use_activation says it here"),
    "raw_scores": Refusal((False,), "use_activation false gives logits"),
    "truncate": _CUTS,
    "truncation": _CUTS,
    "truncation_direction": Refusal(("right", "Right"), "truncation_side says it here"),
    "rank_fields": Refusal(([], ["text"]), "text is what is read"),
    "max_chunks_per_doc": Refusal((1,), "max_tokens_per_doc cuts documents"),
    "overlap_tokens": _ZERO,
    "relevant_spans": Refusal(),
    "instruction": Refusal(("",), "put it into the query"),
    "chat_template": Refusal(instead="pairs are encoded as transformers does"),
    "chat_template_kwargs": Refusal(({},)),
    "return_embeddings": _OFF,
    "return_token_ids": _OFF,
}
MESSAGE: dict[str, Refusal] = {
    "audio": Refusal(instead="send text"),
    "refusal": Refusal(("",), "send it as content"),
}

# routes of those APIs that are not served yet
UNSERVED = (
    *("/v1/responses/", "/v1/messages/", "/v1/moderations", "/v1/audio", "/v1/images", "/v1/videos"),
    *("/v1/files", "/v1/uploads", "/v1/batches", "/v1/fine_tuning", "/v1/vector_stores", "/v1/containers"),
    *("/v1/assistants", "/v1/threads", "/v1/conversations", "/v1/realtime", "/v1/evals", "/v1/engines", "/v1/edits"),
    *("/v1/chat/completions/", "/v1/organization", "/generate", "/inference/v1"),
)
_GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/models")
_SERVED = "POST /v1/chat/completions and /v1/completions generate, GET /v1/models lists who answers"


def refuse_unsupported(
    body: BaseModel, refused: Mapping[str, Refusal] = {}, messages: Sequence[BaseModel] = ()
) -> None:
    """Raise one RequestError that names every field of `body`, and of its `messages`, that is not honoured.

    What nobody defines is logged and ignored.
    """
    found = [(name, name, refusal) for name, refusal in _refused(body, refused)]
    for number, message in enumerate(messages):
        found += [(f"messages[{number}].{name}", name, refusal) for name, refusal in _refused(message, MESSAGE)]
    if not found:
        return
    first_paths: dict[tuple[bool, str], tuple[str, Refusal]] = {}
    for path, name, refusal in found:  # what many messages have is named where it first stands
        first_paths.setdefault((path == name, name), (path, refusal))
    told = [f"{path} is not supported yet: {refusal.remedy}" for path, refusal in first_paths.values()]
    raise RequestError("unsupported_field", ". ".join(told[:_MAX_NAMED]), found[0][0])


def what_is_there(path: str) -> str:
    """What a client is told who asked for a path that nothing answers to."""
    shown = repr(path[:128])
    if any(path == prefix or path.startswith(prefix.rstrip("/") + "/") for prefix in UNSERVED):
        return f"{shown} is not served yet; {_SERVED}"
    for served in _GENERATING:
        if path.rstrip("/").endswith(served.removeprefix("/v1")):
            return f"there is no route {shown}; you may mean {served}"
    return f"there is no route {shown}; {_SERVED}, and GET /openapi.json describes all routes"


def _refused(body: BaseModel, refused: Mapping[str, Refusal]) -> Iterator[tuple[str, Refusal]]:
    extra = body.model_extra or {}
    if len(extra) > _MAX_UNKNOWN_FIELDS:
        raise RequestError("invalid_request", f"the body has {len(extra)} fields that are not known here")
    for name, value in extra.items():
        refusal = _refusal(name, refused)
        if refusal is None:
            _log.debug("ignored an unknown field", field=name[:64])
        elif not refusal.allows(value, body):
            yield name, refusal


def _refusal(name: str, refused: Mapping[str, Refusal]) -> Refusal | None:
    """Why a field that nobody reads is refused, if it is. A body of which none is refused only manages."""
    if name in refused:
        return refused[name]
    return _UNKNOWN_ADAPTER if refused and _NAMES_ADAPTER.search(name) else None
