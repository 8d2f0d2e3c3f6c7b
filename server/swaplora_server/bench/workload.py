"""The requests of a run: who answers each, its prompt, its length, and when it is due. All follow from the seed."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

from swaplora_server.bench.options import FIRST_TOKEN_ID, Distribution, Lengths, Options


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One request, ready to send: `adapter` is an index into the run's adapters, None the base."""

    adapter: int | None
    num_output_tokens: int
    body: bytes


def make_requests(options: Options, count: int, purpose: str) -> list[PromptRequest]:
    """`count` requests. What is drawn for one `purpose` is not drawn for another, but for the shared prefix."""
    models = Random(f"{options.seed} {purpose} models")
    tokens = Random(f"{options.seed} {purpose} tokens")
    chosen = choose_adapters(options.distribution, len(options.adapters), count, models, alpha=options.alpha or 1.0)
    prompts = make_prompts(options, count, tokens)
    requests = []
    for adapter, prompt in zip(chosen, prompts, strict=True):
        num_output_tokens = _draw(options.output_tokens, tokens)
        body = _body(options, adapter, prompt, num_output_tokens)
        requests.append(PromptRequest(adapter, num_output_tokens, json.dumps(body, separators=(",", ":")).encode()))
    return requests


def choose_adapters(
    distribution: Distribution, num_adapters: int, count: int, rng: Random, alpha: float = 1.0
) -> list[int | None]:
    """Who answers each of `count` requests.

    `distinct` goes round; `power` asks for the i-th adapter (from 1) at a rate that goes as i^-alpha, the power law by
    which S-LoRA (arXiv 2311.03285) skews its request rates; `zipf` is that with alpha 1.
    """
    match distribution:
        case "base":
            return [None] * count
        case "same":
            return [0] * count
        case "distinct":
            return [number % num_adapters for number in range(count)]
        case "uniform":
            return [rng.randrange(num_adapters) for _ in range(count)]
        case "zipf" | "power":
            exponent = alpha if distribution == "power" else 1.0
            return [*rng.choices(range(num_adapters), _rates(num_adapters, exponent), k=count)]


def make_prompts(options: Options, count: int, rng: Random) -> Iterator[list[int]]:
    """`count` prompts as token ids, below the vocabulary's size, that begin with the shared prefix."""
    ids = range(FIRST_TOKEN_ID, options.vocab_size)
    prefix = Random(f"{options.seed} prefix").choices(ids, k=options.shared_prefix)
    for _ in range(count):
        yield [*prefix, *rng.choices(ids, k=_draw(options.prompt_tokens, rng) - len(prefix))]


def arrival_times(count: int, rate: float, burstiness: float, rng: Random) -> list[float]:
    """Arrivals of an open loop: seconds from the start, the first at 0, 1 / `rate` apart in the mean.

    The time between two is gamma distributed with shape `burstiness`, a Poisson process where that is 1: its squared
    coefficient of variation is 1 / `burstiness`.
    """
    gaps = (rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count - 1))
    return [*accumulate(gaps, initial=0.0)]


def _rates(num_adapters: int, alpha: float) -> Sequence[float]:
    return [number**-alpha for number in range(1, num_adapters + 1)]


def _draw(lengths: Lengths, rng: Random) -> int:
    return rng.randint(lengths.low, lengths.high)


def _body(options: Options, adapter: int | None, prompt: Sequence[int], num_output_tokens: int) -> dict[str, Any]:
    """A completion of fixed length, streamed."""
    body: dict[str, Any] = {
        "model": options.base if adapter is None else options.adapters[adapter],
        "prompt": prompt,
        "max_tokens": num_output_tokens,
        "temperature": options.temperature,
        **{name: value for name in ("top_p", "top_k") if (value := getattr(options, name)) is not None},
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.dialect == "openai":
        return body | {"return_token_ids": True}  # a token may have no text yet: its ids show that it is there
    body |= {"model": options.base, "cache_prompt": False}
    return body if adapter is None else body | {"lora": [{"id": adapter, "scale": 1.0}]}
