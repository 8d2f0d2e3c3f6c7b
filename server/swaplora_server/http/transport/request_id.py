"""Every answer names its request: the client's `X-Request-Id` if it is a plain one, else one made here."""

import re
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADER = "x-request-id"
_log = structlog.get_logger(__name__)
_PLAIN = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id_of(given: str) -> str:
    """What a request is called, of which the client says `given`."""
    return given if _PLAIN.fullmatch(given) else uuid.uuid4().hex


class RequestIdMiddleware:
    """Plain ASGI, so that streams and disconnects pass through untouched. Logs what nobody foresaw."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope).get(_HEADER, ""))

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_HEADER] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_named)
            except Exception:  # noqa: BLE001 - the boundary: answered by the app's own handler, logged here by id
                _log.exception("a request failed", path=scope["path"])
