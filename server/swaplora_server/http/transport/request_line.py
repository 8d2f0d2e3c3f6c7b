"""What of a request's first line is looked at before the routes: HEAD, and the path below which a proxy serves them."""

from starlette.types import ASGIApp, Receive, Scope, Send


class RequestLine:
    """Plain ASGI. HEAD is answered wherever GET is, and the server under this leaves the body out (RFC 9110, 9.3.2).

    `root_path` is in front of a path or was cut off by the proxy; both are found.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            scope = {**scope, "method": method, "root_path": self._root_path}
        await self._app(scope, receive, send)
