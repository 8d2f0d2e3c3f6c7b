"""Which requests are given to another replica when one is lost or not well, how often, and for how long."""

import math
import time

from starlette.datastructures import Headers
from starlette.types import Scope

from swaplora_server.http.tasks import MAX_TIMEOUT_SECONDS, TIMEOUT_HEADER

MAX_TRIES = 3
_MAX_HAD = 1  # tries of which a replica had the request, and failed: what brings one down is not shown to all of them
_START_SECONDS = 30.0  # that replicas may take to have a request, all tries together
_TAKEN_SECONDS = 10.0  # that one may, where another can be asked
_WITHOUT_EFFECT = frozenset({"GET", "HEAD", "OPTIONS"})
ASKING = frozenset({
    "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/invocations", "/v1/embeddings", "/pooling", "/classify", "/v1/classify", "/score", "/v1/score",
    "/rerank", "/v1/rerank", "/v2/rerank", "/tokenize", "/detokenize",
})  # fmt: skip  # what a POST to these asks for leaves nothing behind


def may_repeat(method: str, path: str) -> bool:
    """Whether it makes no difference that a replica has done it before, or a part of it."""
    return method in _WITHOUT_EFFECT or (method == "POST" and path in ASKING)


class Tries:
    """Of one request: how many there were, and how much time there is for the next."""

    def __init__(self, scope: Scope) -> None:
        self._began = self._looking_since = time.monotonic()
        self._num = 1
        self._num_had = 0
        self._limit = _told_seconds(scope)

    @property
    def seconds_left(self) -> float:
        """Until the client waits no longer; inf where it does not say."""
        return self._limit - (time.monotonic() - self._began)

    def start_seconds(self, *, may_repeat: bool) -> float:
        """That the replica which is asked now may take to have the request: no longer than the client waits."""
        left = self._start_seconds_left
        return min(left, _TAKEN_SECONDS) if may_repeat and self.has_another(was_had=False) else left

    def has_another(self, *, was_had: bool) -> bool:
        """Whether there may be one more when this fails; `was_had` says that the replica had the request."""
        has_time = self.seconds_left > 0 if was_had else self._start_seconds_left > 0
        return self._num < MAX_TRIES and self._num_had + was_had <= _MAX_HAD and has_time

    def count(self, *, was_had: bool) -> None:
        """This one has failed, and there is another."""
        self._num += 1
        self._num_had += was_had
        if was_had:
            self._looking_since = time.monotonic()

    @property
    def _start_seconds_left(self) -> float:
        left = _START_SECONDS - (time.monotonic() - self._looking_since)
        return max(0.0, min(left, self.seconds_left))


def _told_seconds(scope: Scope) -> float:
    """How long the client waits, where it says that so that it is understood."""
    try:
        told = float(Headers(scope=scope).get(TIMEOUT_HEADER, math.inf))
    except ValueError:
        return math.inf
    return told if 0 < told <= MAX_TIMEOUT_SECONDS else math.inf
