"""What a page in somebody's browser may ask of this server: hosts and origins are checked, and CORS is answered."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from swaplora_server.config import Settings
from swaplora_server.http.errors import RETRY_HEADERS, error_response
from swaplora_server.service.errors import RequestError

EXPOSED_HEADERS = ("x-request-id", "x-swaplora-adapter", "x-swaplora-digest", *RETRY_HEADERS)
_LOOPBACK_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?"
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]*))(?::\d*)?")
_SHOWN_CHARS = 128


def guard_browsers(app: ASGIApp, settings: Settings) -> ASGIApp:
    """`app`, with CORS for the origins that may ask, and refusals for other pages and for hosts that are not ours."""
    return _Guard(_shared(app, settings), Pages(settings))


class Pages:
    """Which pages may ask, and by which names of this server.

    On loopback the pages of this machine may ask too: what serves them could ask without a browser.
    """

    def __init__(self, settings: Settings) -> None:
        is_open = settings.is_loopback and not settings.has_keys
        self._hosts = (settings.host, *settings.allowed_host) if is_open or settings.allowed_host else ("*",)
        self._shared = _shared(_no_app, settings)

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Raise RequestError for a host that is not ours, and for what a page sends that may not."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not is_own_host(host, self._hosts):
            name = host[:_SHOWN_CHARS]
            raise RequestError("host_not_allowed", f"{name!r} is not a name of this server: --allowed-host adds one")
        is_foreign = _is_cross_site(headers) if origin is None else not self._may_ask(origin, host)
        if is_foreign and method != "OPTIONS":  # a preflight is refused in CORS's own words
            page = f"pages of {origin[:_SHOWN_CHARS]!r}" if origin else "pages of other sites"
            raise RequestError("origin_not_allowed", f"{page} may not ask this server: --cors-allow-origin lets them")

    def early_headers(self, origin: str | None) -> dict[str, str]:
        """What an answer to a page of some origin needs that no route gives, so that the page may read it."""
        if not origin or not self._shared.is_allowed_origin(origin):
            return {}
        exposed = ", ".join(EXPOSED_HEADERS)
        return {"access-control-allow-origin": origin, "vary": "Origin", "access-control-expose-headers": exposed}

    def kind(self, method: str, headers: Mapping[str, str]) -> str | None:
        """The same of two requests to whose answers CORS adds the same; None for one that `check` refuses."""
        try:
            self.check(method, headers)
        except RequestError:
            return None
        origin = headers.get("origin")
        if origin is None:
            return "no page"
        names_it = not self._shared.allow_all_origins and self._shared.is_allowed_origin(origin)
        return origin if names_it else "a page"

    def _may_ask(self, origin: str, host: str) -> bool:
        """A page of this server itself, or of an origin that was allowed."""
        return origin.partition("://")[2].lower() == host.lower() or self._shared.is_allowed_origin(origin)


async def _no_app(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Of which only who may ask is wanted."""


def _shared(app: ASGIApp, settings: Settings) -> CORSMiddleware:
    return CORSMiddleware(
        app,
        allow_origins=settings.cors_allow_origin,
        allow_origin_regex=_LOOPBACK_ORIGIN if settings.is_loopback else None,
        allow_methods=("*",),
        allow_headers=("*",),  # who may ask is decided by the origin; client libraries send headers of their own
        allow_private_network=True,
        expose_headers=EXPOSED_HEADERS,
    )


class _Guard:
    """Plain ASGI, so that streams pass through untouched."""

    def __init__(self, app: ASGIApp, pages: Pages) -> None:
        self._app = app
        self._pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self._pages.check(scope["method"], headers)
            except RequestError as error:
                early = self._pages.early_headers(headers.get("origin"))
                await error_response(error, early)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_own_host(host: str, allowed: Sequence[str]) -> bool:
    """Whether a Host header names this server, or cannot be the name of a web site.

    DNS rebinding needs a name that its site owns: no address is one, nor is what has no dot or ends in `.localhost`.
    `allowed` are names, `*` in them standing for anything.
    """
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = (match[1] or match[2]).lower().rstrip(".")
    if "." not in name or name.endswith(".localhost") or _is_address(name):
        return True
    return any(fnmatchcase(name, pattern.lower()) for pattern in allowed)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_cross_site(headers: Mapping[str, str]) -> bool:
    """What a browser says of a request without an origin, such as an image's; a link that is followed may be."""
    is_link = headers.get("sec-fetch-dest") == "document"
    return headers.get("sec-fetch-site") == "cross-site" and not is_link
