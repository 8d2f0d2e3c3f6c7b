"""Who may ask: every route but the public ones depends on `authenticate`."""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Request
from pydantic import SecretStr

from swaplora_server.service.errors import RequestError


class KeyRing:
    """The keys of which a request must carry one, kept as hashes. An empty ring lets everyone in."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = [_digest(key.get_secret_value()) for key in keys]

    def admits(self, key: str | None) -> bool:
        """Compared in constant time, against every key."""
        if not self._digests:
            return True
        given = _digest(key or "")
        return bool(sum(hmac.compare_digest(given, digest) for digest in self._digests)) and key is not None


async def _keys(request: Request) -> KeyRing:
    keys: KeyRing = request.app.state.keys
    return keys


async def authenticate(request: Request, keys: Annotated[KeyRing, Depends(_keys)]) -> None:
    """A dependency. Raises RequestError unless the request carries `Authorization: Bearer KEY` with one of the keys.

    Anthropic's clients send `x-api-key: KEY`, which counts where there is no Authorization.
    """
    if "authorization" not in request.headers:
        given = request.headers.get("x-api-key")
    else:
        scheme, _, key = request.headers["authorization"].partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else None
    if not keys.admits(given):
        raise RequestError("invalid_api_key", "send a valid API key as Authorization: Bearer KEY")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
