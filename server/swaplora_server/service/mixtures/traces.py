"""Which members of a mixture the tokens of one prompt take, layer by layer and module by module."""

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from swaplora_adapters.errors import MixtureNotFoundError
from swaplora_adapters.store.records import VersionRecord
from swaplora_adapters.weights.router import Shares
from swaplora_server.engine.request import SamplingParams
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generating.task import GenerationTask
from swaplora_server.service.generation import generate
from swaplora_server.service.service import Service

MAX_TRACED_TOKENS = 256
MAX_CHOICES = 2**17  # that one answer shows
_LAYER = re.compile(r"\.([0-9]+)\.")


@dataclass(eq=False)
class PromptTrace:
    """What the engine's thread notes, of `num_tokens` tokens. No cached block is used: its key is nobody else's."""

    num_tokens: int
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    shares: Shares | None = None  # [num_modules, num_tokens, num_members]
    top_k: int | None = None  # of the mixture that has begun

    def begin(self, top_k: int) -> None:
        """See `Trace`."""
        self.top_k = top_k

    def note(self, start: int, shares: Shares) -> None:
        """See `Trace`. What is computed twice comes to the same."""
        if self.shares is None:
            num_modules, _, num_members = shares.shape
            self.shares = np.full((num_modules, self.num_tokens, num_members), np.nan, np.float32)
        seen = self.shares[:, start : start + shares.shape[1]]
        np.fmax(seen, shares, out=seen)  # which takes no NaN where there is a number


class ModuleChoices(NamedTuple):
    """At one module: of each token the members that it takes, most of all first, and how much of each."""

    module: str
    layer: int | None  # None outside of layers
    members: list[list[int]]
    shares: list[list[float]]


@dataclass(frozen=True, slots=True)
class TracedPrompt:
    """A prompt's tokens, the versions of the members, and what was chosen at every module that these add to."""

    token_ids: Sequence[int]
    records: Sequence[VersionRecord]
    shares: dict[str, Shares]  # by module [num_tokens, num_members]
    top_k: int

    @property
    def num_choices(self) -> int:
        return len(self.shares) * len(self.token_ids) * self.top_k

    def choices(self) -> Iterator[ModuleChoices]:
        """Of one module after the other; long, all together."""
        for path, shares in self.shares.items():
            order = np.argsort(-shares, axis=1, kind="stable")[:, : self.top_k]
            layer = _LAYER.search(path)
            taken = np.take_along_axis(shares, order, axis=1).astype(np.float64).round(6)
            yield ModuleChoices(path, layer and int(layer[1]), order.tolist(), taken.tolist())


async def trace(service: Service, name: str, token_ids: Sequence[int]) -> TracedPrompt:
    """Have a mixture read a prompt, in the shared batch, with one token behind it that nobody sees.

    Raises RequestError, also for a prompt that is too long to be shown, and AdapterError: NotOwnerError where a member
    is another's, whose weights the shares would tell.
    """
    if len(token_ids) > MAX_TRACED_TOKENS:
        message = f"the prompt has {len(token_ids)} tokens, and a trace shows at most {MAX_TRACED_TOKENS}: shorten it"
        raise RequestError("invalid_request", message, "prompt")
    seen = PromptTrace(len(token_ids))

    async def encode() -> Sequence[Sequence[int]]:
        return [token_ids]

    # scores of the prompt bring every row through the whole of the last layer
    sampling = SamplingParams(1, temperature=0.0, num_prompt_logprobs=0)
    task = GenerationTask(model=name, encode=encode, sampling=sampling, max_tokens=1, operation="trace", trace=seen)
    generation = await generate(service, task)
    try:
        for record in generation.records:
            service.registry.names.check_is_own(record.name)
        while generation.outcome is None:
            await generation.arrival()
            for _ in generation.arrived():
                pass
    finally:
        generation.abort()
    if seen.top_k is None:  # the name has come to stand for something else
        raise MixtureNotFoundError(f"there is no mixture called {name[:128]!r}")
    if seen.shares is None:
        raise RequestError("engine_failed", "nothing was seen of the mixture's choices; see the server's log")
    seen_at = zip(service.base.paths, seen.shares, strict=True)
    shares = {path: shares for path, shares in seen_at if not np.isnan(shares).all()}
    traced = TracedPrompt(token_ids, generation.records, shares, seen.top_k)
    if traced.num_choices > MAX_CHOICES:
        most = MAX_CHOICES * len(token_ids) // traced.num_choices
        message = f"a trace shows at most {MAX_CHOICES} choices, of this mixture those of {most} tokens: shorten it"
        raise RequestError("invalid_request", message, "prompt")
    return traced
