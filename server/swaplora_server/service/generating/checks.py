"""Whether what a generation is asked for can be: token ids that there are, what fits, and no more numbers than may be.

All raise RequestError, which names the request's field.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from swaplora_server.engine.request import AdapterUse, SamplingParams
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generating.task import GenerationTask
from swaplora_server.service.service import Service

MAX_SCORES = 2**19  # numbers that one answer has of its prompts
MAX_STREAMED_SCORES = 2**16


def params_of(service: Service, task: GenerationTask, prompts: Sequence[Sequence[int]]) -> SamplingParams:
    """What the engine is told; the end-of-sequence ids stop a request unless it ignores them."""
    asked = task.sampling
    _check_sampling_ids(service, asked)
    max_tokens = min(_room(service, task, number, prompt) for number, prompt in enumerate(prompts))
    if asked.min_tokens > max_tokens:
        message = f"min_tokens is {asked.min_tokens}, and at most {max_tokens} tokens may be generated: ask for no more"
        raise RequestError("invalid_request", message, "min_tokens")
    ends = asked.stop_token_ids | (frozenset() if task.ignore_eos else service.base.eos_token_ids)
    if asked.min_tokens and asked.allowed_token_ids is not None and asked.allowed_token_ids <= ends:
        message = "allowed_token_ids has only tokens that end the answer, which none of the first min_tokens may do"
        raise RequestError("invalid_request", f"{message}: allow others, or leave min_tokens out", "allowed_token_ids")
    return replace(asked, max_tokens=max_tokens, stop_token_ids=ends)


def check_ids(service: Service, token_ids: Collection[int], param: str) -> None:
    """Raise RequestError for an id that the base has no token for: it would index what is not there."""
    largest, limit = max(token_ids, default=0), service.base.vocab_size
    if largest >= limit:
        message = f"{param}: token id {largest} is not in the base's vocabulary, whose ids end at {limit - 1}"
        raise RequestError("invalid_request", message, param)


def check_scores(task: GenerationTask, prompts: Sequence[Sequence[int]]) -> None:
    """Raise for more numbers and tokens of its prompts than an answer may have."""
    num, most = num_scores(task, prompts), MAX_STREAMED_SCORES if task.is_streamed else MAX_SCORES
    if num > most:
        message = (
            f"{num} numbers and tokens are asked for of the prompts, and an answer has at most {most}: that is "
            "the prompts' tokens times the choices, times one more than the likeliest wanted: send fewer prompts"
        )
        raise RequestError("invalid_request", message, task.prompt_param(0))


def check_uses(uses: Sequence[AdapterUse]) -> None:
    """Raise RequestError for an adapter that was trained to classify."""
    if any(use.weights.head is not None for use in uses):
        message = "the adapter classifies, and generates nothing: ask it at POST /classify, or for tokens at /pooling"
        raise RequestError("invalid_request", message, "model")


def num_scores(task: GenerationTask, prompts: Sequence[Sequence[int]]) -> int:
    """What an answer has of its prompts: of each token, in each choice, itself, and the likeliest in its place."""
    num_logprobs = task.sampling.num_prompt_logprobs
    each = task.has_echo if num_logprobs is None else 1 + num_logprobs
    return sum(map(len, prompts)) * task.n * each


def _check_sampling_ids(service: Service, asked: SamplingParams) -> None:
    check_ids(service, asked.stop_token_ids, "stop_token_ids")
    check_ids(service, asked.allowed_token_ids or (), "allowed_token_ids")
    check_ids(service, [token_id for token_id, _ in asked.logit_bias], "logit_bias")


def _room(service: Service, task: GenerationTask, number: int, prompt: Sequence[int]) -> int:
    """How many tokens may follow `prompt`. Raises RequestError when it, or it and what is asked for, do not fit."""
    param = task.prompt_param(number)
    if not prompt:
        raise RequestError("invalid_request", f"{param} is empty", param)
    check_ids(service, prompt, param)
    room, wanted = service.max_model_len - len(prompt), 1 if task.max_tokens is None else task.max_tokens
    if wanted > room:
        is_too_long = room < 1 or task.max_tokens is None
        raise RequestError(
            "context_length_exceeded",
            f"This model's maximum context length is {service.max_model_len} tokens. However, you requested "
            f"{len(prompt) + wanted} tokens ({len(prompt)} in the prompt, {wanted} to generate). "
            f"{f'Shorten {param}' if is_too_long else f'Ask for at most {room}, or shorten {param}'}.",
            param if is_too_long else task.length_param,
        )
    return room if task.max_tokens is None else task.max_tokens
