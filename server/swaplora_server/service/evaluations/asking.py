"""One item asked of one model, behind all else that waits, and what the answer is worth."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from swaplora_adapters.store.records import Mixing
from swaplora_server.engine.request import LAST_PRIORITY, SamplingParams
from swaplora_server.evaluation.metrics import answer_scores, choice_scores
from swaplora_server.evaluation.task import Item
from swaplora_server.service.adapter_mix import BoundMixture
from swaplora_server.service.admission import Urgency
from swaplora_server.service.errors import RequestError
from swaplora_server.service.evaluations.record import Evaluated
from swaplora_server.service.generating.task import GenerationTask
from swaplora_server.service.generation import Generation, generate
from swaplora_server.service.service import Service

LOOK_SECONDS = 0.02
_AGAIN = frozenset({"overloaded", "rate_limited", "memory_full"})
_MEMORY_SECONDS = 1
MEMORY_PATIENCE_SECONDS = 300
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asking:
    """How every item is asked: greedily, with as many tokens, until one of the `stop` strings."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    cache_salt: str | None = None


async def scores_of(service: Service, asking: Asking, model: Evaluated, item: Item) -> list[float]:
    """What `model` makes of `item`, as METRICS has them. Raises RequestError and AdapterError."""
    text, has_marks = await _prompt(service, item)
    if item.choices is None:
        said = await _patiently(service, partial(_answer, service, asking, model, text, has_marks=has_marks))
        score = partial(service.gil_turns.do, partial(answer_scores, item, said))
        return await _patiently(service, partial(service.offload.do, len(said), score))
    logprob = partial(_logprob, service, asking, model, text, has_marks=has_marks)
    return choice_scores(item, [await _patiently(service, partial(logprob, choice)) for choice in item.choices])


async def _patiently(service: Service, ask: Callable[[], Awaitable[T]]) -> T:
    """What `ask` comes to, begun once it can run at once, so that it takes nobody's place in the queue.

    Of the places of all evaluations one is held only while it is asked, none between two tries.
    """
    clock = asyncio.get_running_loop().time
    full_since: float | None = None  # of memory
    while True:
        async with service.evaluations.places:
            if service.admissions.num_sequences < service.max_rows:
                try:
                    return await ask()
                except RequestError as error:
                    full_since = (full_since or clock()) if error.code == "memory_full" else None
                    is_lost = full_since is not None and clock() - full_since >= MEMORY_PATIENCE_SECONDS
                    if is_lost or error.code not in _AGAIN:
                        raise
                    seconds: float = error.retry_seconds or _MEMORY_SECONDS
            else:
                service.check_serving()
                seconds = LOOK_SECONDS
        await asyncio.sleep(seconds)


async def _prompt(service: Service, item: Item) -> tuple[str, bool]:
    """Its text, and whether a template has written the special tokens."""
    if item.prompt is not None:
        return item.prompt, False
    messages = [turn.model_dump() for turn in item.messages or ()]
    render = partial(
        service.chat_template.render, messages, {}, add_generation_prompt=True, continue_final_message=False
    )
    size = sum(len(message["content"]) for message in messages)
    return await service.when_long(size, render), True


async def _ids(service: Service, text: str, *, has_marks: bool) -> list[int]:
    [token_ids] = await service.tokenizer.encode_all([text], _param, add_special_tokens=not has_marks)
    return token_ids


async def _answer(service: Service, asking: Asking, model: Evaluated, text: str, *, has_marks: bool) -> str:
    token_ids = await _ids(service, text, has_marks=has_marks)
    generation = await _generated(service, asking, model, token_ids, SamplingParams(1, temperature=0.0))
    return await _read(generation)


async def _logprob(
    service: Service, asking: Asking, model: Evaluated, text: str, choice: str, *, has_marks: bool
) -> float:
    """The natural logarithm of how likely the tokens of `choice` are behind the prompt.

    The choice's are those from the first on that the prompt alone does not have, which may have grown together with
    the prompt's last. As lm-eval has it, space at the prompt's end belongs to the choice, whose first word has it in
    most vocabularies.
    """
    prompt_ids = await _ids(service, text.rstrip(), has_marks=has_marks)
    token_ids = await _ids(service, text + choice, has_marks=has_marks)
    sampling = SamplingParams(0, temperature=0.0, num_prompt_logprobs=0)
    generation = await _generated(service, asking, model, token_ids, sampling)
    await _read(generation)
    scored = generation.prompt_scores(0)  # of all tokens but the first
    return sum(one.chosen for one in scored[max(0, _num_shared(prompt_ids, token_ids) - 1) :])


def _num_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many both begin with."""
    pairs = zip(ids, others, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(others)))


async def _generated(
    service: Service, asking: Asking, model: Evaluated, token_ids: Sequence[int], sampling: SamplingParams
) -> Generation:
    async def encode() -> Sequence[Sequence[int]]:
        return [token_ids]

    mixture = model.mixture
    members = [] if mixture is None else [member.reference for member in mixture.members]
    task = GenerationTask(
        model=model.reference,
        mixture=None if mixture is None else BoundMixture(members, Mixing(mixture.top_k, mixture.temperature)),
        encode=encode,
        sampling=sampling,
        max_tokens=asking.max_tokens if sampling.max_tokens else 0,
        stops=asking.stop if sampling.max_tokens else (),
        cache_salt=asking.cache_salt,
        urgency=Urgency(LAST_PRIORITY),
        prompt_param=_param,
    )
    return await generate(service, task)


async def _read(generation: Generation) -> str:
    """The whole text. Raises RequestError where it ends by an error."""
    parts: list[str] = []
    try:
        while generation.outcome is None:
            await generation.arrival()
            parts += [piece.text for piece in generation.arrived()]
    finally:
        generation.abort()
    return "".join(parts)


def _param(_number: int) -> str:
    return "task"
