"""What FastAPI gives to routes that ask for it, and checks before them."""

from typing import Annotated

import structlog
from fastapi import Depends, Request
from opentelemetry import trace

from swaplora_server.access.caller import Caller
from swaplora_server.http.auth import COUNTED_AS
from swaplora_server.service.errors import RequestError
from swaplora_server.service.service import Service
from swaplora_server.service.tenant import TenantService

ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"  # says who answers, at INVOCATIONS alone
INVOCATIONS = "/invocations"


async def _service(request: Request) -> Service:
    """With the caller's adapters alone, where there is a caller; public routes look at none."""
    service: Service = request.app.state.service
    caller: Caller | None = getattr(request.state, "caller", None)
    if caller is None:
        return service
    return TenantService(service, caller, request_id(), peer_of(request), request.scope.get(COUNTED_AS))


def peer_of(request: Request) -> str:
    """The address that it came from, if it did from one."""
    peer, _ = request.scope.get("client") or ("", 0)
    return str(peer)


def request_id() -> str:
    """Of the running request, as the answer and the log have it."""
    found: str = structlog.contextvars.get_contextvars().get("request_id", "")
    return found


Serving = Annotated[Service, Depends(_service)]  # it may still be starting: see `Service.check_serving`


async def note_trace() -> None:
    """A dependency: lines in the log say which trace their request belongs to, if it belongs to one."""
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        structlog.contextvars.bind_contextvars(trace_id=trace.format_trace_id(span.trace_id))


async def refuse_adapter_header(request: Request) -> None:
    """A dependency of every route. Raises RequestError where nobody reads SageMaker's header that says who answers."""
    if ADAPTER_HEADER in request.headers and request.scope["route"].path != INVOCATIONS:
        message = f"{ADAPTER_HEADER} names an adapter at {INVOCATIONS} alone: name it in the request here"
        raise RequestError("unsupported_field", message, ADAPTER_HEADER)


async def refuse_unknown_parameters(request: Request) -> None:
    """A dependency. Raises RequestError for a query parameter that the route does not take, or that comes twice."""
    known = {param.alias for param in request.scope["route"].dependant.query_params}
    unknown = sorted(request.query_params.keys() - known)
    if unknown:
        raise RequestError("invalid_request", f"{unknown[0][:64]!r} is not a query parameter here", unknown[0][:64])
    names = [name for name, _ in request.query_params.multi_items()]
    if twice := next((name for name in known if names.count(name) > 1), None):
        raise RequestError("invalid_request", f"{twice} is given more than once", twice)
