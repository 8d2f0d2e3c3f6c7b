"""GET /metrics, and the count of what is asked and answered."""

import asyncio

from fastapi import APIRouter, Depends, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import COUNT_OUT, needs
from swaplora_server.http.dependencies import Serving, refuse_unknown_parameters
from swaplora_server.http.described import TEXT
from swaplora_server.service.metrics.metrics import Metrics

router = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"application/openmetrics-text": {"schema": TEXT}}}},
)
@needs(KeyScope.ADMIN)
async def metrics(request: Request, service: Serving) -> Response:
    """Prometheus's text format, or OpenMetrics' where that is accepted. Answers while the server starts, too."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    body = await asyncio.to_thread(encode, service.metrics.registry)
    return Response(body, headers={"content-type": media_type})


class CountedRequests:
    """Plain ASGI: counts each request at its end, by the route that took it and the class of its status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body") and (count_out := scope.get(COUNT_OUT)):
                count_out()  # before the last of the answer: who has read it may ask again
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        finally:
            route = scope.get("route")  # absent for a path that nothing answers to
            self._metrics.count_request("none" if route is None else route.path, status)
