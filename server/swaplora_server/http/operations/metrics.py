"""GET /metrics, and the count of what is asked and answered."""

import asyncio
import time
from typing import Any, cast

from fastapi import APIRouter, Depends, Request
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import COUNT_OUT, needs
from swaplora_server.http.dependencies import Serving, refuse_unknown_parameters
from swaplora_server.http.described import TEXT
from swaplora_server.http.transport.request_log import log_request
from swaplora_server.log_lines import begin_notes
from swaplora_server.service.metrics.metrics import Metrics

router = APIRouter(dependencies=[Depends(refuse_unknown_parameters)])


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"application/openmetrics-text": {"schema": TEXT}}}},
)
@needs(KeyScope.METRICS)
async def metrics(request: Request, service: Serving) -> Response:
    """Prometheus's text format, or OpenMetrics' where that is accepted. Answers while the server starts, too."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    # what it escapes by default is the colon of vLLM's names, in samples and not above them; nothing else here needs it
    body = await asyncio.to_thread(cast("Any", encode), service.metrics.registry, escaping=ALLOWUTF8)
    return Response(body, headers={"content-type": media_type})


class CountedRequests:
    """Plain ASGI: counts each request at its end, by its route and the class of its status, and logs it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None
        began, notes = time.monotonic(), begin_notes()

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
            found = scope.get("route")  # absent for a path that nothing answers to
            route = "none" if found is None else found.path
            self._metrics.count_request(route, status)
            log_request(scope, route, status, time.monotonic() - began, notes)
