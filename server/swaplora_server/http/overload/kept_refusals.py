"""Refusals that were answered lately, and how: who asks as before is answered as before, while that is still so."""

from collections import OrderedDict
from collections.abc import Iterable
from http import HTTPStatus

from starlette.types import Message, Scope

from swaplora_server.http.overload.asking_again import AskingAgain
from swaplora_server.http.overload.refusal_log import RefusalLog
from swaplora_server.http.transport.body import SMALL_BYTES
from swaplora_server.http.transport.request_id import request_id_of
from swaplora_server.service.errors import RefusedBy, RequestError

MAX_KEPT = 1024  # kinds of requests
MAX_ANSWERS = 64  # of one kind: they differ in when to try again
MAX_KIND_BYTES = 2048
Headers = Iterable[tuple[bytes, bytes]]
Answer = tuple[bytes, bytes]  # lines of headers, and the body
_NAMING_HEADER = b"x-amzn-sagemaker-adapter-identifier"  # says who answers instead of the body
# what the app looks at before it refuses, beside the path; all else may differ between requests that are alike
_LOOKED_AT = frozenset(
    {
        *(b"authorization", b"x-api-key", b"host", b"origin", b"sec-fetch-site", b"sec-fetch-dest"),
        *(b"content-type", b"content-encoding"),
        *(_NAMING_HEADER, b"x-amzn-sagemaker-session-id"),
    }
)
_OF_ITS_OWN = frozenset({b"x-request-id", b"connection"})  # of an answer: for that request, on that connection


class Kept:
    """Of requests that are alike how they are refused."""

    def __init__(self, asking: AskingAgain, log: RefusalLog) -> None:
        self.asking = asking
        self.by = RefusedBy.KEY  # the most that was looked at
        self._answers: dict[tuple[str, str], Answer] = {}
        self._log = log

    def add(self, error: RequestError, by: RefusedBy, headers: Headers, body: bytes) -> None:
        """How the app answers with `error`."""
        self.by = max(self.by, by)
        if len(self._answers) >= MAX_ANSWERS:
            self._answers.clear()
        lines = b"".join(header_line(header) for header in headers if header[0].lower() not in _OF_ITS_OWN)
        self._answers[error.code, error.message] = (lines, body)

    def looks_at(self, num_bytes: int) -> bool:
        """Whether a body of so many bytes may decide."""
        return self.by is RefusedBy.NAMED and num_bytes <= SMALL_BYTES

    def answer(self, scope: Scope, body: bytes | bytearray | None) -> Answer | None:
        """What the app would answer a request like these with now, which is counted as answered.

        None where it may do otherwise.
        """
        peer, _ = scope.get("client") or ("", 0)
        is_looked_at = body is not None and self.looks_at(len(body))
        error = self.asking.error(self.by, str(peer), body if is_looked_at else None)
        found = None if error is None else self._answers.get((error.code, error.message))
        if error is None or found is None:
            return None
        self.asking.count(error, HTTPStatus.TOO_MANY_REQUESTS)
        self._log.add(scope["method"], self.asking.route, self.asking.caller, error.code)
        lines, content = found
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        return lines + header_line((b"x-request-id", request_id_of(given.decode("latin-1")).encode())), content


class KeptRefusals:
    """Of the kinds of requests that were refused last; lives on the event loop.

    What is kept is how to say it. Whether it is so is asked anew for each request: nobody is refused by what was.
    """

    def __init__(self) -> None:
        self._log = RefusalLog()
        self._kept: OrderedDict[tuple[bytes, ...], Kept] = OrderedDict()  # the one that was refused last at its end

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, scope: Scope) -> Kept | None:
        """How requests like this one were refused, if they were."""
        return self._kept.get(_kind(scope)) if self._kept else None

    def keep(self, scope: Scope, start: Message, body: bytes) -> None:
        """The app has answered a request with 429: from now on those like it may be."""
        state = scope["state"]
        asking, error = state.get("asking_again"), state.get("refused")
        kind = _kind(scope)
        if not isinstance(asking, AskingAgain) or not isinstance(error, RequestError) or error.by is None:
            return
        if scope["method"] == "HEAD" or sum(map(len, kind)) > MAX_KIND_BYTES or _NAMING_HEADER in kind:
            return
        kept = self._kept.get(kind)
        if kept is None or kept.asking.caller is not asking.caller:
            kept = self._kept[kind] = Kept(asking, self._log)
        kept.add(error, error.by, start["headers"], body)
        self._kept.move_to_end(kind)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)


def header_line(header: tuple[bytes, bytes]) -> bytes:
    """As it stands in a head."""
    return b"%b: %b\r\n" % header


def _kind(scope: Scope) -> tuple[bytes, ...]:
    """The same of two requests that the app takes for the same until it looks at their bodies."""
    looked_at = (part for header in scope["headers"] if header[0] in _LOOKED_AT for part in header)
    return scope["method"].encode(), scope["raw_path"], scope["query_string"], *looked_at
