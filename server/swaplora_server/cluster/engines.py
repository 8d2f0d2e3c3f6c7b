"""What the ingress asks of the replicas, whatever they run on."""

from collections.abc import AsyncGenerator
from typing import Protocol

from starlette.types import Message

from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.exchange import Answer, Forwarded


class ReplicaLostError(Exception):
    """The replica that was answering has gone, or cannot be reached."""


class Engines(Protocol):
    """All replicas."""

    def stream(self, key: RouteKey, request: Forwarded) -> AsyncGenerator[list[Message]]:
        """What the replica that is chosen by `key` sends; first an empty list, when the request is there.

        Who is chosen is added to `key.tried`: with the same key the next one is asked.
        Closing it is the client's going. Raises ReplicaLostError.
        """
        ...

    async def feed(self, exchange_id: str, body: bytes, *, is_last: bool) -> None:
        """The next of a request's body, for the replica that has it. Raises ReplicaLostError."""
        ...

    def ask_all(self, request: Forwarded) -> AsyncGenerator[Answer]:
        """The whole answer of each replica, `missing` of one that gives none in time; closing it ends the others."""
        ...
