"""What the proof of isolation asks, of one server or of several by turns."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from serving import BASE, Streamed, read_event

SCALE = -0.7  # of the second term of a sum


class Asked(NamedTuple):
    """Who is to answer: a model by its name, or a sum by the names and scales of its terms."""

    kind: str  # as it is counted
    model: str = BASE
    terms: tuple[tuple[str, float], ...] = ()


THE_BASE = Asked("base")


def adapter(name: str) -> Asked:
    return Asked("adapters", name)


def alias(name: str) -> Asked:
    return Asked("aliases", name)


def mixture(name: str) -> Asked:
    return Asked("mixtures", name)


def sum_of(first: str, second: str) -> Asked:
    return Asked("sums", BASE, ((first, 1.0), (second, SCALE)))


@dataclass
class Servers:
    """Clients of all of them. A turn is a number that stands for one, and the next number for the next one."""

    clients: Sequence[httpx.AsyncClient]
    num_changes: int = 0
    num_asked: Counter[Asked] = field(default_factory=Counter)

    async def change(self, method: str, path: str, **content: Any) -> tuple[httpx.Response, int]:
        """The answer, and whose turn is next: what has been acknowledged is asked elsewhere."""
        self.num_changes = turn = self.num_changes + 1
        return await self._client(turn).request(method, path, **content), turn + 1

    async def ask(self, asked: Asked, max_tokens: int, turn: int | None = None) -> Streamed:
        """One greedy stream; one that is refused has its error. Without a turn the same is asked of all by turns."""
        client = self._next(asked) if turn is None else self._client(turn)
        async with client.stream("POST", "/v1/chat/completions", json=body_of(asked, max_tokens)) as response:
            said = Streamed(dict(response.headers))
            if response.status_code != 200:
                said.error = httpx.Response(response.status_code, content=await response.aread()).json()["error"]
            async for line in response.aiter_lines():
                if line.startswith("data: ") and said.error is None:
                    read_event(said, line.removeprefix("data: "))
        return said

    async def ask_whole(self, asked: Asked, max_tokens: int) -> tuple[Streamed, list[float]]:
        """The same, not streamed, and of each token how much likelier it was than the next one, in log-probability."""
        body = body_of(asked, max_tokens) | {"stream": False, "top_logprobs": 2}
        response = await self._next(asked).post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            return Streamed(dict(response.headers), error=response.json()["error"]), []
        choice = response.json()["choices"][0]
        tokens, reason = choice["logprobs"]["content"], choice["finish_reason"]
        logprobs = [token["logprob"] for token in tokens]
        tops = [[top["logprob"] for top in token["top_logprobs"]] for token in tokens]
        said = Streamed(dict(response.headers), choice["token_ids"], logprobs, finish_reason=reason)
        return said, [first - second for first, second in tops]

    def _next(self, asked: Asked) -> httpx.AsyncClient:
        self.num_asked[asked] += 1
        return self._client(self.num_asked[asked])

    def _client(self, turn: int) -> httpx.AsyncClient:
        return self.clients[turn % len(self.clients)]


def body_of(asked: Asked, max_tokens: int) -> dict[str, Any]:
    terms = [{"name": name, "scale": scale} for name, scale in asked.terms]
    return {
        "model": asked.model,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "logprobs": True,
        "return_token_ids": True,
        **({"adapters": terms} if terms else {}),
    }
