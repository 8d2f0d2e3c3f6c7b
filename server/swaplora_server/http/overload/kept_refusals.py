"""Refusals that were answered lately, and how: who asks as before is answered as before, while that is still so."""

from collections import OrderedDict
from collections.abc import Iterable
from http import HTTPStatus
from typing import NamedTuple

from starlette.types import Message, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from swaplora_server.config import Settings
from swaplora_server.http.auth import given_key
from swaplora_server.http.overload.asking_again import AskingAgain
from swaplora_server.http.overload.refusal_log import RefusalLog
from swaplora_server.http.transport.body import SMALL_BYTES, is_json
from swaplora_server.http.transport.browsers import Pages
from swaplora_server.http.transport.request_id import request_id_of
from swaplora_server.service.errors import RefusedBy, RequestError

MAX_KEPT = 1024  # kinds of requests
MAX_ANSWERS = 64  # of one kind: they differ in when to try again
MAX_KIND_CHARS = 2048
Header = tuple[bytes, bytes]
_NAMING_HEADER = "x-amzn-sagemaker-adapter-identifier"  # says who answers instead of the body
_OF_ITS_OWN = frozenset({b"x-request-id", b"connection"})  # of an answer: for that request, on that connection


class Refusal(NamedTuple):
    """An answer with 429."""

    lines: bytes  # of its headers
    body: bytes

    def whole(self, default_headers: Iterable[Header], *, is_last: bool) -> bytes:
        """All of it; the connection ends with it if it is the last."""
        lines = [STATUS_LINE[HTTPStatus.TOO_MANY_REQUESTS], *map(header_line, default_headers), self.lines]
        if is_last:
            lines.append(header_line((b"connection", b"close")))
        return b"".join([*lines, b"\r\n", self.body])


class Kept:
    """Of requests that are alike how they are refused."""

    def __init__(self, asking: AskingAgain, log: RefusalLog) -> None:
        self.asking = asking
        self.by = RefusedBy.KEY  # the most that was looked at
        self._answers: dict[tuple[str, str], Refusal] = {}
        self._log = log

    def add(self, error: RequestError, by: RefusedBy, headers: Iterable[Header], body: bytes) -> None:
        """How the app answers with `error`."""
        self.by = max(self.by, by)
        if len(self._answers) >= MAX_ANSWERS:
            self._answers.clear()
        lines = b"".join(header_line(header) for header in headers if header[0].lower() not in _OF_ITS_OWN)
        self._answers[error.code, error.message] = Refusal(lines, body)

    def looks_at(self, num_bytes: int) -> bool:
        """Whether a body of so many bytes may decide."""
        return self.by is RefusedBy.NAMED and num_bytes <= SMALL_BYTES

    def answer(self, scope: Scope, body: bytes | bytearray | None) -> Refusal | None:
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
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        named = header_line((b"x-request-id", request_id_of(given.decode("latin-1")).encode()))
        return found._replace(lines=found.lines + named)


class _Kind(NamedTuple):
    """The same of two requests that the app takes for the same until it looks at their bodies."""

    method: str
    path: str
    key: str | None
    page: str
    is_json: bool  # or does not say
    has_name: bool  # of who is to answer, among its headers


class KeptRefusals:
    """Of the kinds of requests that were refused last; lives on the event loop.

    What is kept is how to say it. Whether it is so is asked anew for each request: nobody is refused by what was.
    """

    def __init__(self, settings: Settings, pages: Pages) -> None:
        self._has_keys = settings.has_keys
        self._pages = pages
        self._log = RefusalLog()
        self._kept: OrderedDict[_Kind, Kept] = OrderedDict()  # the one that was refused last at its end

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, scope: Scope) -> Kept | None:
        """How requests like this one were refused, if they were."""
        kind = self._kind(scope) if self._kept else None
        return None if kind is None else self._kept.get(kind)

    def keep(self, scope: Scope, start: Message, body: bytes) -> None:
        """The app has answered a request with 429: from now on those like it may be."""
        state = scope["state"]
        asking, error = state.get("asking_again"), state.get("refused")
        if not isinstance(asking, AskingAgain) or not isinstance(error, RequestError) or error.by is None:
            return
        kind = self._kind(scope)
        if kind is None or kind.method == "HEAD" or (kind.has_name and error.by is RefusedBy.NAMED):
            return
        if len(kind.path) + len(kind.key or "") + len(kind.page) > MAX_KIND_CHARS:
            return
        kept = self._kept.get(kind)
        if kept is None or kept.asking.caller is not asking.caller:
            kept = self._kept[kind] = Kept(asking, self._log)
        kept.add(error, error.by, start["headers"], body)
        self._kept.move_to_end(kind)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def _kind(self, scope: Scope) -> _Kind | None:
        """None for what is refused to pages."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        page = self._pages.kind(scope["method"], headers)
        if page is None:
            return None
        content_type = headers.get("content-type", "")
        says_json = not content_type or is_json(content_type)
        key = given_key(headers) if self._has_keys else None
        return _Kind(scope["method"], scope["path"], key, page, says_json, _NAMING_HEADER in headers)


def header_line(header: Header) -> bytes:
    """As it stands in a head."""
    return b"%b: %b\r\n" % header
