"""A server in front of replicas that are applications in this process: all that passes between them, and no Ray."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
from starlette.types import ASGIApp, Message

from serving import listening
from swaplora_server.access.key_ring import KeyRing
from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.engines import ReplicaLostError
from swaplora_server.cluster.exchange import Answer, Exchanges, Forwarded, whole_answer
from swaplora_server.cluster.front.ingress import Ingress
from swaplora_server.cluster.gathered import labelled
from swaplora_server.config import Settings
from swaplora_server.http.transport.protocol import HttpConfig


@dataclass
class LocalEngines:
    """Replicas by name; which one answers next, and what they are asked, is for the test to say and see."""

    replicas: dict[str, Exchanges]
    chosen: str
    keys: list[RouteKey] = field(default_factory=list)
    num_parts: int = 0
    lost_after: int | None = None  # messages, from which on the replica is gone

    async def stream(self, key: RouteKey, request: Forwarded) -> AsyncGenerator[list[Message]]:
        self.keys.append(key)
        num_sent = 0
        messages = self.replicas[self.chosen].stream(request)
        try:
            async for sent in messages:
                if self.lost_after is None:
                    yield sent
                    continue
                for message in sent:
                    num_sent += 1
                    if num_sent > self.lost_after:
                        raise ReplicaLostError("a fault of the test")
                    yield [message]
        finally:
            await messages.aclose()

    async def feed(self, exchange_id: str, body: bytes, *, is_last: bool) -> None:
        self.num_parts += 1
        for replica in self.replicas.values():
            replica.feed(exchange_id, body, is_last=is_last)

    async def ask_all(self, request: Forwarded) -> AsyncGenerator[Answer]:
        for name, exchanges in self.replicas.items():
            yield labelled(await whole_answer(exchanges, request, name))


@dataclass(frozen=True)
class Front:
    url: str
    client: httpx.Client
    engines: LocalEngines


@contextmanager
def front_of(settings: Settings, *apps: ASGIApp) -> Iterator[Front]:
    """A server in front of these; the first is asked unless the test says otherwise."""
    engines = LocalEngines({f"r{number}": Exchanges(app) for number, app in enumerate(apps)}, "r0")
    keys = KeyRing([key.get_secret_value() for key in settings.api_key], settings.key_file)
    http = HttpConfig(Ingress(settings, engines, keys), settings)
    with listening(http) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield Front(url, client, engines)
