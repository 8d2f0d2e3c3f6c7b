"""The application: its routes, who may use which, and how errors are answered."""

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from swaplora_adapters.errors import AdapterError
from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import authorise, check_declared, is_public, needs
from swaplora_server.http.dependencies import note_trace, refuse_adapter_header
from swaplora_server.http.described import REFUSED, with_keys
from swaplora_server.http.errors import on_client_gone, on_defect, on_http_error, on_invalid_parameter, on_request_error
from swaplora_server.http.evaluations import gates
from swaplora_server.http.evaluations import routes as evaluations
from swaplora_server.http.foreign import lora_adapters
from swaplora_server.http.mixtures import routes as mixtures
from swaplora_server.http.operations import health, keys, metrics
from swaplora_server.http.pages import routes_page, ui_page
from swaplora_server.http.pooling import classify, embeddings, pooling, rerank, score
from swaplora_server.http.routes import (
    adapters,
    aliases,
    chat,
    completions,
    compose,
    control,
    inspection,
    invocations,
    messages,
    models,
    responses,
    tokenize,
)
from swaplora_server.http.sse import ClientGoneError
from swaplora_server.http.transport.body_memory import AccountedBodies, BodyMemory
from swaplora_server.http.transport.browsers import guard_browsers
from swaplora_server.http.transport.request_id import RequestIdMiddleware
from swaplora_server.http.transport.request_line import RequestLine
from swaplora_server.http.transport.request_log import ASKED_TIME_AND_AGAIN
from swaplora_server.service.errors import RequestError
from swaplora_server.service.gates.judging import judged
from swaplora_server.service.service import Service

_HANDLERS: dict[int | type[Exception], Any] = {
    RequestError: on_request_error,
    AdapterError: on_request_error,
    HTTPException: on_http_error,
    RequestValidationError: on_invalid_parameter,
    ClientDisconnect: on_client_gone,
    ClientGoneError: on_client_gone,
    Exception: on_defect,
}


def create_app(service: Service, bodies: BodyMemory) -> RequestIdMiddleware:
    """The whole HTTP surface over `service`, which may still be starting.

    Raises RuntimeError for a route that does not say whom it is for.
    """
    root_path = service.settings.root_path
    app = FastAPI(
        title="swaplora",
        lifespan=lambda _app: judged(service),
        dependencies=[Depends(note_trace), Depends(authorise), Depends(refuse_adapter_header)],
        telemetry=_telemetry(service, root_path),
        exception_handlers=_HANDLERS,
        openapi_url=None,
        redirect_slashes=False,
        responses=REFUSED,
        servers=[{"url": root_path}] if root_path else None,
    )
    app.state.service = service
    public: set[str] = set()
    methods: defaultdict[str, set[str]] = defaultdict(set)
    for module in (
        health,
        models,
        completions,
        chat,
        invocations,
        responses,
        messages,
        tokenize,
        embeddings,
        classify,
        pooling,
        score,
        rerank,
        adapters,
        gates,
        inspection,
        compose,
        aliases,
        mixtures,
        evaluations,
        control,
        lora_adapters,
        metrics,
        keys,
        routes_page,
        *([ui_page] if service.settings.ui else []),
    ):
        check_declared(module.router.routes)
        app.include_router(module.router)
        for route in module.router.routes:
            assert isinstance(route, APIRoute)
            methods[route.path] |= set(route.methods or ())
            if is_public(route):
                public.add(route.path)
    app.state.methods = methods
    app.openapi = _described(app, service, public)  # type: ignore[method-assign]  # FastAPI's own way to change it
    app.get("/openapi.json", include_in_schema=False)(_openapi)
    accounted = AccountedBodies(app, bodies)
    counted = metrics.CountedRequests(guard_browsers(accounted, service.settings), service.metrics)
    return RequestIdMiddleware(RequestLine(counted, root_path))  # outermost, so that it sees every failure


def _telemetry(service: Service, root_path: str) -> TelemetryConfig:
    """Spans of requests, and nothing but where the setting says so: metrics are Prometheus's, logs may hold what comes.

    What is asked time and again has none.
    """
    return {
        "tracer_provider": service.tracing.provider,
        "tracing": service.tracing.is_on,
        "operation_spans": False,
        "metrics": False,
        "logs": False,
        "auto_configure": False,
        "exclude": lambda scope: scope["path"].removeprefix(root_path) in ASKED_TIME_AND_AGAIN,
    }


def _described(app: FastAPI, service: Service, public: Collection[str]) -> Callable[[], dict[str, Any]]:
    document = app.openapi

    def described() -> dict[str, Any]:
        return document() if service.keys.is_open else with_keys(document(), public)

    return described


@needs(*KeyScope)
def _openapi(request: Request) -> dict[str, Any]:
    """The OpenAPI document, for whoever has a key."""
    document: dict[str, Any] = request.app.openapi()
    return document
