"""Requests that share every step of a server, and what PEFT says to each of their answers."""

import asyncio
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny
from kinds_oracle import SumOracle
from kinds_table import Made
from oracle import Oracle
from serving import BASE, Running, Streamed, stream_chat
from swaplora_server.engine.engine import Engine
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduling.batch import Batch, Sampled

TOLERANCE = 1e-4  # of a log-probability, in float32
SCALES = (0.5, -0.4)
TEXT = "h$(*\f go! "  # tokens that some kinds train, and the invocation of aLoRA's


@dataclass(frozen=True)
class Member:
    """Who is asked, under which name of the server, and PEFT's model of it."""

    name: str
    oracle: Oracle
    adapters: tuple[tuple[str, float], ...] = ()  # of a sum

    @property
    def fields(self) -> dict[str, Any]:
        """Of its requests."""
        if not self.adapters:
            return {"model": self.name}
        return {"model": BASE, "adapters": [{"name": name, "scale": scale} for name, scale in self.adapters]}


@dataclass(frozen=True)
class Company:
    """The kinds of one base, a sum of two of them, and the base."""

    base: Path
    made: Collection[Made]
    max_tokens: int

    @cached_property
    def plain(self) -> Oracle:
        """The base alone."""
        return Oracle(self.base)

    @cached_property
    def members(self) -> list[Member]:
        terms = {made.kind: made for made in self.made}
        first = next(made for made in self.made if made.kind in ("plain", "lora_bias", "wte", "partner"))
        chosen = dict(zip((first.kind, "partner") if first.kind != "partner" else ("partner",), SCALES, strict=False))
        total = SumOracle(self.base, {terms[kind].oracle: scale for kind, scale in chosen.items()})
        summed = Member("sum", total, tuple((slug(kind), scale) for kind, scale in chosen.items()))
        alone = [Member(slug(made.kind), made.oracle) for made in self.made]
        return [Member(BASE, self.plain), *alone, summed]

    def upload(self, server: Running) -> None:
        for made in self.made:
            answer = server.put(slug(made.kind), made.folder)
            assert answer.status_code == 201, answer.text

    async def ask(self, server: Running, **fields: Any) -> dict[str, Streamed]:
        """Every member's answer, all of them streamed at once."""
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            streams = [self.stream(client, member, number, **fields) for number, member in enumerate(self.members)]
            answers = await asyncio.gather(*streams)
        return {member.name: said for member, said in zip(self.members, answers, strict=True)}

    async def stream(self, client: httpx.AsyncClient, member: Member, number: int, **fields: Any) -> Streamed:
        options = {"ignore_eos": True, "max_tokens": self.max_tokens, **member.fields, **fields}
        return await stream_chat(client, options.pop("model"), content(number), options.pop("max_tokens"), **options)

    def wrong(self, answers: Mapping[str, Streamed]) -> set[str]:
        """Of whom PEFT says something else."""
        return {
            member.name
            for number, member in enumerate(self.members)
            if member.name in answers and not is_right(member.oracle, prompt_of(content(number)), answers[member.name])
        }

    def unmoved(self, answers: Mapping[str, Streamed]) -> set[str]:
        """Who says what the base would."""
        return {
            member.name
            for number, member in enumerate(self.members)
            if self.plain.worst_error(
                prompt_of(content(number)), answers[member.name].token_ids, answers[member.name].logprobs
            )
            < 0.1
        }


def slug(kind: str) -> str:
    """A kind as an adapter's name."""
    return kind.replace(",", "").replace(" ", "-")


def content(number: int) -> str:
    """No two begin alike, so that none waits for another's prefix."""
    return f"{chr(65 + number)} {TEXT}"


def prompt_of(text: str) -> list[int]:
    ids: list[int] = tiny.byte_tokenizer().encode(f"<user>{text}\n<assistant>", add_special_tokens=False)
    return ids


def is_right(oracle: Oracle, prompt: list[int], said: Streamed) -> bool:
    """Whether every log-probability is PEFT's, and every token its likeliest or tied with it."""
    return oracle.worst_error(prompt, said.token_ids, said.logprobs) <= TOLERANCE and oracle.is_greedy(
        prompt, said.token_ids, tie=2 * TOLERANCE
    )


@dataclass
class Steps:
    """Whose rows each step had, as digests and scales."""

    keys: list[set[object]] = field(default_factory=list)

    @property
    def most(self) -> int:
        """The most different ones in one step."""
        return max(map(len, self.keys))


def num_submitted(engine: Engine) -> int:
    """Sequences that run or wait."""
    snapshot = engine.snapshot()
    return snapshot.num_running + snapshot.num_waiting


@contextmanager
def gathered(server: Running, count: int, seconds: float = 60.0) -> Iterator[Steps]:
    """Let no step run before `count` sequences are there, so that all of them share steps."""
    steps, run, engine = Steps(), Runner.run, server.service.engine

    def held(self: Runner, batch: Batch) -> list[Sampled]:
        deadline = time.monotonic() + seconds
        while not steps.keys and num_submitted(engine) < count and time.monotonic() < deadline:
            time.sleep(0.002)
        steps.keys.append({rows.sequence.request.adapter_key for rows in batch.rows})
        return run(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "run", held)
        yield steps
