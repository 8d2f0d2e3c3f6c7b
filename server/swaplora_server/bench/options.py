"""What a run of the load generator is asked for, checked before anything is sent."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

Distribution = Literal["base", "same", "distinct", "uniform", "zipf", "power"]
Dialect = Literal["openai", "llamacpp"]

FIRST_TOKEN_ID = 100  # below it many vocabularies keep their special tokens


class OptionsError(ValueError):
    """What cannot be asked for; `args` holds one line for each thing wrong."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A number of tokens, drawn uniformly from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, flag: str, text: str) -> Self:
        """`128`, or `64-512`. Raises OptionsError, which names `flag`."""
        numbers = text.split("-") if "-" in text else [text, text]
        if len(numbers) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in numbers):
            raise OptionsError(f"{flag} {text}: give a number of tokens, or a range such as 64-512")
        lengths = cls(*map(int, numbers))
        if not 1 <= lengths.low <= lengths.high:
            raise OptionsError(f"{flag} {text}: give at least one token, and the smaller end of a range first")
        return lengths

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run. Without `rate` it is a closed loop: `concurrency` requests in flight at all times.

    With `rate`, in requests per second, requests arrive when they are due, however many are in flight; `burstiness` is
    the shape of the gamma distribution of the time between them: 1 (default) is a Poisson process, less is burstier.
    At temperature 0 answers are greedy. `slo_ttft` and `slo_tpot` are milliseconds. Raises OptionsError.
    """

    url: str
    base: str | None = None
    adapters: tuple[str, ...] = ()
    distribution: Distribution = "base"
    alpha: float | None = None
    concurrency: int | None = None
    rate: float | None = None
    burstiness: float | None = None
    requests: int = 64
    warmup: int = 0
    prompt_tokens: Lengths = Lengths(128, 128)
    output_tokens: Lengths = Lengths(64, 64)
    shared_prefix: int = 0
    vocab_size: int = 40_000
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    dialect: Dialect = "openai"
    slo_ttft: float | None = None
    slo_tpot: float | None = None

    def __post_init__(self) -> None:
        reasons = [*self._wrong_models(), *self._wrong_loop(), *self._wrong_sampling(), *self._wrong_numbers()]
        if reasons:
            raise OptionsError(*reasons)

    @property
    def workers(self) -> int:
        """How many requests a closed loop keeps in flight; the warm-up is one, whatever follows it."""
        return self.concurrency or 16

    def _wrong_models(self) -> Iterator[str]:
        if self.distribution == "base":
            if self.base is None:
                yield "nobody to ask: give --base NAME, --adapters A,B,C, or both"
            if self.adapters:
                yield "--adapters is not used by --distribution base: leave one of them out"
        elif not self.adapters:
            yield f"--distribution {self.distribution} needs --adapters A,B,C"
        if len(set(self.adapters)) < len(self.adapters) or "" in self.adapters:
            yield "--adapters has an empty name or the same one twice: give each adapter once"
        if self.alpha is not None and self.distribution != "power":
            yield f"--alpha is not used by --distribution {self.distribution}: leave it out, or use power"
        if self.dialect == "llamacpp" and self.base is None:
            yield "--dialect llamacpp needs --base NAME: adapters are named beside the model there"

    def _wrong_loop(self) -> Iterator[str]:
        if self.rate is not None and self.concurrency is not None:
            yield "--rate and --concurrency exclude each other: requests arrive when due, or when others end"
        if self.burstiness is not None and self.rate is None:
            yield "--burstiness is not used without --rate: give a rate, or leave it out"
        if self.shared_prefix > self.prompt_tokens.low:
            yield f"--shared-prefix {self.shared_prefix} is longer than a prompt of {self.prompt_tokens.low} tokens"

    def _wrong_sampling(self) -> Iterator[str]:
        if not 0 <= self.temperature < math.inf:
            yield f"--temperature {self.temperature}: give 0, which is greedy, or more"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"--top-p {self.top_p}: give a number above 0, up to 1"
        for name in ("top_p", "top_k"):
            if getattr(self, name) is not None and not self.temperature:
                yield f"--{name.replace('_', '-')} is not used by greedy answers: give a --temperature, or leave it out"

    def _wrong_numbers(self) -> Iterator[str]:
        for name in ("alpha", "rate", "burstiness", "slo_ttft", "slo_tpot"):
            number = getattr(self, name)
            if number is not None and not (math.isfinite(number) and number > 0):
                yield f"--{name.replace('_', '-')} {number}: give a number above 0"
        for name, least in (("concurrency", 1), ("requests", 1), ("top_k", 1), ("warmup", 0), ("shared_prefix", 0)):
            number = getattr(self, name)
            if number is not None and number < least:
                yield f"--{name.replace('_', '-')} {number}: give {least} or more"
        if self.vocab_size <= FIRST_TOKEN_ID:
            yield f"--vocab-size {self.vocab_size}: prompts are drawn from the ids from {FIRST_TOKEN_ID} on; give more"
